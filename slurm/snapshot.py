"""The code as it is at submission: a job that waits for days runs what was submitted, whatever is edited meanwhile."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from slurm import layout

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("analysis", "fluidscale", "slurm", "sweeps")


def snapshot(runs_dir: Path) -> Path:
    """Copies the packages beside the runs, once per content, and returns the folder that PYTHONPATH must name."""
    files = [path for name in _PACKAGES for path in sorted((_ROOT / name).rglob("*")) if _belongs(path)]
    content = hashlib.sha256()
    for path in files:
        content.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    target = layout.snapshots(runs_dir) / content.hexdigest()[:16]
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    for path in files:
        copy = partial / path.relative_to(_ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    try:
        partial.rename(target)
    except OSError:
        # Another launch has just made the same one.
        shutil.rmtree(partial)
    return target


def _belongs(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts
