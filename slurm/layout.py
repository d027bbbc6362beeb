"""Where the scheduler keeps its own files: everything of it lies in one hidden folder of the run folder."""

from __future__ import annotations

import socket
from pathlib import Path


def scheduler_dir(runs_dir: Path) -> Path:
    return runs_dir / ".launch"


def trunk_claim(runs_dir: Path, trunk_id: str, stage: str = "whole") -> Path:
    """Held by the worker that trains this trunk; evaluation by jobs of its own has a claim of its own."""
    name = f"{trunk_id}.evaluate" if stage == "evaluate" else trunk_id
    return scheduler_dir(runs_dir) / "trunks" / f"{name}.lock"


def slot(runs_dir: Path, number: int) -> Path:
    """Held by the worker on this core (or GPU) of this machine: two launches never share one."""
    return scheduler_dir(runs_dir) / "slots" / f"{socket.gethostname()}-{number}.lock"


def slots(runs_dir: Path, everywhere: bool = False) -> list[Path]:
    """All slots that were ever used on this machine, or on all that share the runs."""
    paths = sorted((scheduler_dir(runs_dir) / "slots").glob("*.lock"))
    return [path for path in paths if everywhere or path.stem.rpartition("-")[0] == socket.gethostname()]


def launch(runs_dir: Path, launch_id: str) -> Path:
    """Held by a launcher while it lives; its queue of runs lies beside it."""
    return scheduler_dir(runs_dir) / "launches" / f"{launch_id}.lock"


def launches(runs_dir: Path) -> list[Path]:
    """Of all machines that share the runs."""
    return sorted((scheduler_dir(runs_dir) / "launches").glob("*.lock"))


def mirror(runs_dir: Path) -> Path:
    """Held by the one process that mirrors this run folder to MLflow."""
    return scheduler_dir(runs_dir) / "mirror.lock"


def submitting(runs_dir: Path) -> Path:
    """Held by the launch that is adding to SLURM's queue."""
    return scheduler_dir(runs_dir) / "submitting.lock"


def submissions(runs_dir: Path) -> Path:
    """Which trunks the tasks of each submitted array have."""
    return scheduler_dir(runs_dir) / "submissions"


def snapshots(runs_dir: Path) -> Path:
    """Code as it was when it was submitted."""
    return scheduler_dir(runs_dir) / "code"


def worker_logs(runs_dir: Path) -> Path:
    return scheduler_dir(runs_dir) / "workers"
