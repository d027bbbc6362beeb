"""Every life of a run: where it was, how far it came, how it ended, what it cost. So retries are counted apart.

An attempt is opened before a run is computed and closed with its end. One that is found open at the next start died
without a word: its node was lost, or somebody (the kernel, out of memory) killed it.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fluidscale.folder import RunFolder
from fluidscale.record import read_json, write_json
from slurm.placement import RETRIED

# Of RETRIED, the end that nobody told. An `error` is never tried again unasked; `stopped` means somebody wanted it.
NODE_FAILURE = "node_failure"
# A run whose process vanished this often at the same step, without an exception, is given up.
MAX_DEATHS = 3


@dataclass(frozen=True)
class Attempt:
    """One process's work on a run."""

    launch: str
    job: str  # SLURM's id of the task; empty outside of it
    host: str
    started: float  # seconds since the epoch, as `ended`
    devices: int
    life: int = 0  # of the job: how often SLURM had put it back into its queue
    ended: float | None = None
    end: str = ""  # done | diverged | trained | error | stopped | one of RETRIED; empty while it lasts
    step: int = 0  # that it reached


def read(folder: RunFolder) -> list[Attempt]:
    """All attempts so far, the oldest first."""
    content = read_json(folder.path / "attempts.json") or {"attempts": []}
    return [Attempt(**attempt) for attempt in content["attempts"]]


def opened(folder: RunFolder, launch: str, devices: int) -> None:
    """Begins an attempt of this process; only the holder of the trunk's claim may."""
    attempt = Attempt(launch, job_id(), socket.gethostname(), time.time(), devices, life())
    _write(folder, [*bury(folder), attempt])


def closed(folder: RunFolder, end: str) -> None:
    """Ends the newest attempt."""
    *before, newest = read(folder)
    step = int(folder.status.get("step", 0))
    _write(folder, [*before, replace(newest, ended=time.time(), end=end, step=step)])


def bury(folder: RunFolder, end: str = NODE_FAILURE) -> list[Attempt]:
    """All attempts; a last one that nobody closed is, at its last heartbeat. Only the claim's holder may."""
    attempts, status = read(folder), folder.status
    if attempts and attempts[-1].ended is None:
        last = max(attempts[-1].started, float(status.get("heartbeat", 0)))
        attempts[-1] = replace(attempts[-1], ended=last, end=end, step=int(status.get("step", 0)))
        _write(folder, attempts)
    return attempts


def is_open_here(folder: RunFolder) -> bool:
    """Whether the first process of this very task is at work on the run."""
    newest = read(folder)[-1:]
    return any(a.ended is None and (a.job, a.life) == (job_id(), life()) for a in newest)


def retries(attempts: Iterable[Attempt]) -> dict[str, int]:
    """How often each cause put the run back into the queue."""
    return dict(Counter(attempt.end for attempt in attempts if attempt.end in RETRIED))


def exhausted(attempts: Iterable[Attempt], launch: str, bounds: Mapping[str, int]) -> str | None:
    """Why a run is not started once more in this launch; None when it is. A launch by hand counts from nothing."""
    mine = [attempt for attempt in attempts if attempt.launch == launch]
    latest = [(attempt.end, attempt.step) for attempt in mine[-MAX_DEATHS:]]
    if latest == MAX_DEATHS * [(NODE_FAILURE, mine[-1].step if mine else 0)]:
        return f"its process vanished {MAX_DEATHS} times at step {mine[-1].step} without an error: out of memory?"
    for cause, times in retries(mine).items():
        if times > bounds.get(cause, times):
            return f"ended {times} times by {cause}, {bounds[cause]} are allowed (restarts: {cause} of its profile)"
    return None


def seconds(attempts: Iterable[Attempt], heartbeat: float = 0.0) -> float:
    """Device-seconds of all attempts, lost steps included; one that lasts counts up to `heartbeat`."""
    ends = ((a, max(heartbeat, a.started) if a.ended is None else a.ended) for a in attempts)
    return sum(attempt.devices * (end - attempt.started) for attempt, end in ends)


def hours_spent(run_dirs: Iterable[Path]) -> float:
    """Device-hours (core-hours on a CPU) that these runs have used so far."""
    folders = [RunFolder(run_dir) for run_dir in run_dirs]
    return sum(seconds(read(folder), float(folder.status.get("heartbeat", 0))) for folder in folders) / 3600


def job_id() -> str:
    """SLURM's id of this task as squeue prints it; empty outside of a job."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")


def life() -> int:
    """How often SLURM has put this task back into its queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _write(folder: RunFolder, attempts: Iterable[Attempt]) -> None:
    write_json(folder.path / "attempts.json", {"attempts": [asdict(attempt) for attempt in attempts]})
