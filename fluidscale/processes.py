"""Processes of this machine: whether one lives, and what those that are started here do not hear."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def lives(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    stat = Path(f"/proc/{pid}/stat")
    with suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextmanager
def deaf(*numbers: int) -> Iterator[None]:
    """Processes started here never see these signals, which a terminal sends to all: whoever started them decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
