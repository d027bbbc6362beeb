"""Who works on what: advisory file locks that the kernel gives back when their holder dies, however it dies.

A pid written in a file outlives its process and may be given to another; a lock does neither. So every question of
the scheduler (is this trunk being trained, is this core taken, does that launcher still live) is one lock file.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluidscale.record import now

# Asking whether a claim is held takes a shared lock for some microseconds; whoever claims in that instant tries again.
_TRIES, _PAUSE = 8, 0.02


def facts_of_this_process(**more: Any) -> dict[str, Any]:
    """What a lock file says of its holder, and `more`."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), **more}


@dataclass(frozen=True)
class Claim:
    """A held lock; `release` (or the death of this process) frees it."""

    path: Path
    descriptor: int

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Replaces what the lock file says about its holder."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(facts).encode(), 0)

    def release(self) -> None:
        """Frees the claim. The file stays: deleting a lock file lets two processes hold 'the same' lock."""
        os.close(self.descriptor)


def take(path: Path, facts: Mapping[str, Any]) -> Claim | None:
    """Claims `path` for this process, or returns None when another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
            continue
        claim = Claim(path, descriptor)
        try:
            claim.describe(facts)
        except BaseException:
            # A disk that is full: whoever cannot say so holds nothing.
            claim.release()
            raise
        return claim
    os.close(descriptor)
    return None


def is_held(path: Path) -> bool:
    """Whether some living process holds the claim."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holder(path: Path) -> dict[str, Any] | None:
    """What the living holder says of itself; None when nobody holds the claim."""
    for _ in range(_TRIES):
        if not is_held(path):
            return None
        try:
            return json.loads(path.read_text())
        except ValueError:
            # Taken this instant and not described yet.
            time.sleep(_PAUSE)
    return {}
