"""The one door to `fluidscale.run`: a worker that takes trunks from a queue and trains their runs.

A worker knows nothing of its launcher: it claims a slot (a core or a GPU) and one trunk at a time, so several workers,
of several launches, share the work without speaking to each other. Whoever dies frees what it held.
"""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fluidscale.folder import RunFolder
from fluidscale.limits import InvalidInput, from_dict
from fluidscale.record import Placement, is_full, read_json, write_json
from fluidscale.spec import RunSpec
from fluidscale.valid import read_run_spec
from slurm import attempts, claim, layout
from slurm.budget import Budget, UsedUp

# What a worker does of its runs: all of it, or one stage where evaluation has jobs of its own.
WHOLE, TRAIN, EVALUATE = "whole", "train", "evaluate"
# What a stopped worker may take to reach the end of its step before it is unwound where it stands.
STOP_SECONDS = 10.0

# From one look of a process at what the first of its task has begun to the next.
_FOLLOW_SECONDS = 0.2

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
    max_gpu_hours: float = 0.0  # of the whole sweep, spent ones included; 0: no bound
    others: list[str] = field(default_factory=list)  # runs of the sweep that are not to be done: their hours count

    @property
    def run_dirs(self) -> list[Path]:
        return [Path(self.runs_dir) / run_id for run_ids in self.trunks.values() for run_id in run_ids]

    @property
    def budget(self) -> Budget:
        return Budget([*self.run_dirs, *(Path(self.runs_dir) / run_id for run_id in self.others)], self.max_gpu_hours)

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
    """SIGTERM asks the run to stop after its step; a run that does not hear is unwound after `patience` seconds."""

    patience = STOP_SECONDS

    def __init__(self, *more: int) -> None:
        """`more` signals ask the same."""
        self.number = 0
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, *more)}
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._unwind)

    def __call__(self) -> bool:
        return bool(self.number)

    def close(self) -> None:
        """Nothing is unwound any more, and signals mean what they did before."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def cause(self) -> str:
        """The end of an attempt that was stopped."""
        return "stopped"

    def _ask(self, number: int, _: Any) -> None:
        if self.number and number == signal.SIGINT:
            # A second Ctrl-C of somebody who sits there and does not want to wait.
            raise Stopped
        if not self.number:
            signal.setitimer(signal.ITIMER_REAL, self.patience)
        self.number = self.number or number

    def _unwind(self, *_: Any) -> None:
        raise Stopped


def work(queue_path: str, slot_number: int, execute: Execute = execute) -> None:
    """Takes trunks until none is left that is unfinished and unclaimed; returns at once when the slot is taken."""
    stop = StopSignal()
    queue = load_queue(Path(queue_path))
    facts = claim.facts_of_this_process(launch=queue.launch_id, sweep=queue.sweep)
    slot = claim.take(layout.slot(Path(queue.runs_dir), slot_number), facts)
    if slot is None:
        return
    worker = Worker(queue, stop, execute, slot)
    try:
        # Stopped is the end that it was told to come to: what the run has reached lies in its folder.
        with suppress(Stopped):
            while not worker.is_stopped():
                if not any(worker.train(trunk) for trunk in queue.trunks):
                    break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        slot.release()


def work_here(queue: Queue, execute: Execute = execute) -> int:
    """Works on all trunks in this process; returns the signal that stopped it, 0 when none did.

    Raises UsedUp when the sweep's hours do not last.
    """
    # Ctrl-C as well: of a KeyboardInterrupt Lightning makes an exit that looks like the run's own fault.
    stop = StopSignal(signal.SIGINT)
    worker = Worker(queue, stop, execute)
    try:
        with suppress(Stopped):  # as in `work`
            for trunk_id in queue.trunks:
                worker.train(trunk_id)
    finally:
        stop.close()
    budget = queue.budget
    if not stop() and budget.exceeded() and not all(is_over(RunFolder(run_dir)) for run_dir in queue.run_dirs):
        raise UsedUp(budget.reason)
    return stop.number


@dataclass(frozen=True)
class Worker:
    """The work of one process on trunks of a queue: all of it, or one stage where evaluation has jobs of its own."""

    queue: Queue
    stop: StopSignal
    execute: Execute = execute
    slot: claim.Claim | None = None
    stage: str = WHOLE
    restarts: Mapping[str, int] = field(default_factory=dict)  # by cause, how often a run may be started again
    placement: Mapping[str, Any] = field(default_factory=dict)  # what of it is other than the launcher wrote

    def is_stopped(self) -> bool:
        """Whether no further step may be made: SLURM or somebody said so, or the sweep's hours are used up."""
        return self.stop() or self._budget.exceeded()

    @cached_property
    def _budget(self) -> Budget:
        return self.queue.budget

    def train(self, trunk_id: str) -> bool:
        """Executes the unfinished runs of a trunk; False when there are none, or another worker has it."""
        run_dirs = [Path(self.queue.runs_dir) / run_id for run_id in self.queue.trunks[trunk_id]]
        if all(is_over(RunFolder(run_dir), self.stage) for run_dir in run_dirs):
            return False
        launch_id, sweep = self.queue.launch_id, self.queue.sweep
        facts = claim.facts_of_this_process(launch=launch_id, sweep=sweep, trunk=trunk_id)
        held = claim.take(layout.trunk_claim(Path(self.queue.runs_dir), trunk_id, self.stage), facts)
        if held is None:
            return False
        if self.slot is not None:
            self.slot.describe(facts)
        try:
            for run_dir in run_dirs:
                if not self.is_stopped():
                    self._one(run_dir)
        finally:
            held.release()
        return True

    def _one(self, run_dir: Path) -> None:
        """Executes one run; whatever goes wrong is written into its folder and stays there."""
        folder = RunFolder(run_dir)
        if is_over(folder, self.stage):
            return
        if reason := attempts.exhausted(attempts.bury(folder), self.queue.launch_id, self.restarts):
            fail(folder, RuntimeError(reason))
            return
        try:
            spec, placement = self._job(folder)
        except InvalidInput as error:
            fail(folder, error)
            return
        attempts.opened(folder, self.queue.launch_id, placement.processes)
        try:
            self._execute(folder, spec, placement)
        finally:
            # The run is over: nothing is unwound while the reason of its end is asked for.
            signal.setitimer(signal.ITIMER_REAL, 0)
            # On a full disk even this may fail; the next start then closes it.
            with suppress(OSError):
                attempts.closed(folder, self._end(folder))

    def _job(self, folder: RunFolder) -> tuple[RunSpec, Placement]:
        spec, placement = read_job(folder.path)
        return spec, replace(placement, evaluate=self.stage != TRAIN, **self.placement)

    def _execute(self, folder: RunFolder, spec: RunSpec, placement: Placement) -> None:
        try:
            # An earlier life may have left "stopped": from here on that word is of this one.
            folder.set_status("running", phase="start")
            self.execute(spec, folder.path, placement, self.is_stopped)
        except (Stopped, KeyboardInterrupt):
            folder.set_status("stopped")
            raise
        except (Exception, SystemExit) as error:
            if placement.processes > 1 and not is_full(error):
                self._told_as_well(folder)
            if self.is_stopped():
                # submitit answers a preemption with a SystemExit.
                folder.set_status("stopped", error=None if self.stop() else self._budget.reason)
                if isinstance(error, SystemExit):
                    raise
                return
            if is_full(error):
                # No next run would get any further; this one has said so, and is not to blame.
                raise
            state = folder.status.get("state")
            if state != "failed" and not (state == "stopped" and placement.processes > 1):
                fail(folder, error)
            if placement.processes > 1:
                # The others wait for this process in the middle of a step: its end is theirs.
                raise

    def _told_as_well(self, folder: RunFolder) -> None:
        """A run stops when the first of its processes is told to: the word to this one is then still on its way."""
        deadline = time.monotonic() + STOP_SECONDS
        while folder.status.get("state") == "stopped" and not self.is_stopped() and time.monotonic() < deadline:
            time.sleep(_FOLLOW_SECONDS)

    def follow(self, trunk_id: str) -> None:
        """What the other processes of a placement do: each run together with the first, when that has begun it."""
        for run_id in self.queue.trunks[trunk_id]:
            folder = RunFolder(Path(self.queue.runs_dir) / run_id)
            while not (over := is_over(folder, self.stage) or self.is_stopped()) and not attempts.is_open_here(folder):
                time.sleep(_FOLLOW_SECONDS)
            if over:
                continue
            spec, placement = self._job(folder)
            try:
                self.execute(spec, folder.path, placement, self.is_stopped)
            except Exception:
                deadline = time.monotonic() + STOP_SECONDS
                while folder.status.get("state") != "stopped":
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_FOLLOW_SECONDS)

    def _end(self, folder: RunFolder) -> str:
        state = str(folder.status.get("state"))
        return {"stopped": self.stop.cause() if self.stop() else "stopped", "failed": "error"}.get(state, state)


def is_over(folder: RunFolder, stage: str = WHOLE) -> bool:
    """Whether nothing is left to do for a run: it has its record, or failed and was not asked for again.

    Training is over with the weights; an evaluation that finds none has nothing to do either.
    """
    if (folder.path / "record.json").exists() or folder.status.get("state") == "failed":
        return True
    return stage != WHOLE and folder.weights.exists() == (stage == TRAIN)


def read_job(run_dir: Path) -> tuple[RunSpec, Placement]:
    """What the launcher wrote into a run's folder."""
    spec = read_run_spec(run_dir / "spec.json")
    if spec.id != run_dir.name:
        raise InvalidInput(f"{run_dir}/spec.json was changed: it describes {spec.id}; delete the folder to start anew")
    content = read_json(run_dir / "placement.json")
    if content is None:
        raise InvalidInput(f"{run_dir}/placement.json is missing; start the sweep again to write it")
    return spec, from_dict(Placement, content, str(run_dir / "placement.json"))


def fail(folder: RunFolder, error: BaseException) -> None:
    """Marks a run as failed: the reason's last line in its status, the whole story in its log."""
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[-1]}"
    with open(folder.path / "log.txt", "a") as log:
        log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} failed\n")
        log.write("".join(traceback.format_exception(error)))
    folder.set_status("failed", error=reason)
