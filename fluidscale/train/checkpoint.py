"""Checkpoints that are whole or absent: written beside their target, flushed, renamed, the previous one kept.

One file, or of a sharded model a folder (`fluidscale.train.sharding`) whose META has everything but tensors.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO

from fluidscale.record import read_json, write_atomic
from fluidscale.spec import InvalidInput, RunSpec

log = logging.getLogger(__name__)
NEWEST, PREVIOUS = "last.ckpt", "previous.ckpt"
META, SIZES = "meta.pt", "sizes.json"


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to the disk. Writing `last.ckpt` first renames the one that was there to `previous.ckpt`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        make_room(path)
        write_atomic(path, buffer.getvalue())
        flush_folder(path.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, **_: Any) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))


def make_room(path: Path) -> None:
    """NEWEST makes room for its successor by becoming PREVIOUS."""
    if path.name == NEWEST and path.exists():
        remove(path.with_name(PREVIOUS))
        path.replace(path.with_name(PREVIOUS))


def flush_folder(folder: Path) -> None:
    """Puts the names in a folder on disk, as fsync of a file puts its content there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file below a folder, its own list of them left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SIZES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def remove(path: Path) -> None:
    """Deletes a checkpoint of either form; there may be none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _content(path: Path) -> dict[str, Any]:
    if path.is_dir() and sizes(path) != read_json(path / SIZES):
        raise ValueError("files are missing or cut short")
    return torch.load(path / META if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True)


def newest_loadable(
    candidates: list[Path], last_step: int, sharded: bool = False, spec: RunSpec | None = None
) -> tuple[Path, int] | None:
    """The candidate with the most steps (at most `last_step`) that loads, and its step; None to start anew.

    A corrupt one is passed over with a warning: the run then goes on from an older state and ends the same. Raises
    InvalidInput on one of the other form, or of another run than `spec`.
    """
    found: list[tuple[int, Path]] = []
    for path in candidates:
        try:
            content = _content(path)
        except FileNotFoundError:
            continue
        except Exception as error:
            log.warning("%s does not load (%s): an older checkpoint is used", path, str(error).splitlines()[0])
            continue
        if path.is_dir() != sharded:
            kind = "fsdp" if path.is_dir() else "single or ddp"
            raise InvalidInput(f"{path}: written by a placement with strategy {kind}; keep that, or delete it")
        if spec is not None:
            _check_owner(path, content, spec)
        found.append((int(content["global_step"]), path))
    usable = [(step, path) for step, path in found if step <= last_step]
    if not usable:
        return None
    step, path = max(usable, key=lambda item: item[0])
    return path, step


def _check_owner(path: Path, content: dict[str, Any], spec: RunSpec) -> None:
    """Runs of one trunk are one run up to the branch step; checkpoints of earlier versions do not name their trunk."""
    owner = content["callbacks"]["Monitor"]
    shared = int(content["global_step"]) <= spec.train.branch_step
    mine = owner["run_id"] == spec.id or (shared and owner.get("trunk_id", spec.trunk_id) == spec.trunk_id)
    if not mine:
        raise InvalidInput(f"{path}: a checkpoint of {owner['run_id']}, not of {spec.id}; delete it, or restore it")
