"""Checkpoints that are whole or absent: written beside their target, flushed, renamed, the previous one kept."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO

from fluidscale.record import write_atomic

log = logging.getLogger(__name__)
NEWEST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to the disk. Writing `last.ckpt` first renames the one that was there to `previous.ckpt`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        if path.name == NEWEST and path.exists():
            path.replace(path.with_name(PREVIOUS))
        write_atomic(path, buffer.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, **_: Any) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def newest_loadable(candidates: list[Path], last_step: int) -> tuple[Path, int] | None:
    """The candidate with the most steps (at most `last_step`) that loads, and its step; None to start anew.

    A corrupt one is passed over with a warning: the run then goes on from an older state and ends the same.
    """
    found: list[tuple[int, Path]] = []
    for path in candidates:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found.append((int(content["global_step"]), path))
        except FileNotFoundError:
            continue
        except Exception as error:
            log.warning("%s does not load (%s): an older checkpoint is used", path, str(error).splitlines()[0])
    usable = [(step, path) for step, path in found if step <= last_step]
    if not usable:
        return None
    step, path = max(usable, key=lambda item: item[0])
    return path, step
