"""Processes of this machine."""

from __future__ import annotations

import contextlib
from pathlib import Path


def lives(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False
