"""The one door to `fluidscale.run`: a worker that takes trunks from a queue and trains their runs.

A worker knows nothing of its launcher: it claims a slot (a core or a GPU) and one trunk at a time, so several workers,
of several launches, share the work without speaking to each other. Whoever dies frees what it held.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluidscale.folder import RunFolder
from fluidscale.record import Placement, now, read_json, write_json
from fluidscale.spec import InvalidInput, RunSpec, from_dict, run_spec_from_json
from slurm import claim, layout

# A run whose process vanished this often at the same step, without an exception, is given up.
MAX_DEATHS = 3
# What a stopped worker may take to reach the end of its step before it is unwound where it stands.
STOP_SECONDS = 10.0

Execute = Callable[[RunSpec, Path, Placement, Callable[[], bool]], None]


class Stopped(BaseException):
    """The worker was told to stop; not an Exception, so that no handler on the way takes it for a fault."""


@dataclass(frozen=True)
class Queue:
    """The runs of one launch by trunk: trunks in the order to take them, runs in ascending order of steps."""

    launch_id: str
    sweep: str
    runs_dir: str
    trunks: dict[str, list[str]]

    @property
    def path(self) -> Path:
        return layout.launch(Path(self.runs_dir), self.launch_id).with_suffix(".json")

    def save(self) -> Path:
        write_json(self.path, asdict(self))
        return self.path


def load_queue(path: Path) -> Queue:
    return from_dict(Queue, read_json(path) or {}, str(path))


def execute(spec: RunSpec, run_dir: Path, placement: Placement, should_stop: Callable[[], bool]) -> None:
    """Trains and evaluates one run; torch is imported here and nowhere before."""
    from fluidscale.run import run

    run(spec, run_dir, placement, should_stop)


class StopSignal:
    """SIGTERM asks the run to stop after its step; a run that does not hear is unwound after STOP_SECONDS."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGALRM, self._unwind)

    def __call__(self) -> bool:
        return self.received

    def _ask(self, *_: Any) -> None:
        if not self.received:
            signal.setitimer(signal.ITIMER_REAL, STOP_SECONDS)
        self.received = True

    def _unwind(self, *_: Any) -> None:
        raise Stopped


def work(queue_path: str, slot_number: int, execute: Execute = execute) -> None:
    """Takes trunks until none is left that is unfinished and unclaimed; returns at once when the slot is taken."""
    stop = StopSignal()
    queue = load_queue(Path(queue_path))
    facts = {"pid": os.getpid(), "launch": queue.launch_id, "sweep": queue.sweep, "since": now()}
    slot = claim.take(layout.slot(Path(queue.runs_dir), slot_number), facts)
    if slot is None:
        return
    try:
        while not stop():
            free = next((trunk for trunk in queue.trunks if train_trunk(queue, trunk, slot, execute, stop)), None)
            if free is None:
                return
    except Stopped:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        slot.release()


def train_trunk(
    queue: Queue, trunk_id: str, slot: claim.Claim | None, execute: Execute, stop: Callable[[], bool]
) -> bool:
    """Executes the unfinished runs of a trunk; False when there are none, or another worker has it."""
    runs_dir = Path(queue.runs_dir)
    run_dirs = [runs_dir / run_id for run_id in queue.trunks[trunk_id]]
    if all(is_over(RunFolder(run_dir)) for run_dir in run_dirs):
        return False
    facts = {"pid": os.getpid(), "launch": queue.launch_id, "sweep": queue.sweep, "since": now(), "trunk": trunk_id}
    held = claim.take(layout.trunk_claim(runs_dir, trunk_id), facts)
    if held is None:
        return False
    if slot is not None:
        slot.describe(facts)
    for run_dir in run_dirs:
        if not stop():
            _one(run_dir, queue.launch_id, execute, stop)
    held.release()
    return True


def is_over(folder: RunFolder) -> bool:
    """Whether nothing is left to do for a run: it has its record, or failed and was not asked for again."""
    return (folder.path / "record.json").exists() or folder.status.get("state") == "failed"


def _one(run_dir: Path, launch_id: str, execute: Execute, stop: Callable[[], bool]) -> None:
    """Executes one run; whatever goes wrong is written into its folder and stays there."""
    folder = RunFolder(run_dir)
    if is_over(folder) or _given_up(folder, launch_id):
        return
    try:
        spec, placement = read_job(run_dir)
        execute(spec, run_dir, placement, stop)
    except (Stopped, KeyboardInterrupt):
        folder.set_status("stopped")
        raise
    except (Exception, SystemExit) as error:
        if stop():
            # Lightning answers SIGTERM, and submitit a preemption, with a SystemExit.
            folder.set_status("stopped")
            if isinstance(error, SystemExit):
                raise
        elif folder.status.get("state") != "failed":
            fail(folder, error)


def read_job(run_dir: Path) -> tuple[RunSpec, Placement]:
    """What the launcher wrote into a run's folder."""
    spec = run_spec_from_json((run_dir / "spec.json").read_text(), str(run_dir / "spec.json"))
    if spec.id != run_dir.name:
        raise InvalidInput(f"{run_dir}/spec.json was changed: it describes {spec.id}; delete the folder to start anew")
    content = read_json(run_dir / "placement.json")
    if content is None:
        raise InvalidInput(f"{run_dir}/placement.json is missing; start the sweep again to write it")
    return spec, from_dict(Placement, content, str(run_dir / "placement.json"))


def _given_up(folder: RunFolder, launch_id: str) -> bool:
    """Counts the processes of this launch that vanished while they worked on a run (killed, out of memory)."""
    path = folder.path / "deaths.json"
    status = folder.status
    if status.get("state") != "running":
        path.unlink(missing_ok=True)
        return False
    before = read_json(path) or {}
    seen = {"launch": launch_id, "step": status.get("step", 0)}
    deaths = 1 + (before["deaths"] if {key: before.get(key) for key in seen} == seen else 0)
    write_json(path, {**seen, "deaths": deaths})
    if deaths < MAX_DEATHS:
        return False
    place = f"at step {seen['step']} ({status.get('phase', 'unknown phase')})"
    fail(folder, RuntimeError(f"its process vanished {deaths} times {place} without an error: out of memory?"))
    return True


def fail(folder: RunFolder, error: BaseException) -> None:
    """Marks a run as failed: the reason's last line in its status, the whole story in its log."""
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[-1]}"
    with open(folder.path / "log.txt", "a") as log:
        log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} failed\n")
        log.write("".join(traceback.format_exception(error)))
    folder.set_status("failed", error=reason)

