"""This machine as a cluster: submitit's local executor holds one persistent worker a core or GPU.

The launcher only watches: it starts a worker wherever a slot is free and a trunk is unclaimed, and reads files. So a
second launch adopts the workers of a first that was killed, and two launches at once share the machine.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from submitit.local.local import LocalExecutor, LocalJob

from fluidscale.folder import RunFolder
from fluidscale.processes import deaf
from fluidscale.record import read_json, write_atomic, write_json
from fluidscale.spec import InvalidInput, to_json
from fluidscale.valid import read_run_spec
from slurm import claim, layout
from slurm.budget import UsedUp
from slurm.job import STOP_SECONDS, Execute, Queue, execute, work
from slurm.mirror import Mirror
from slurm.placement import Machine
from slurm.plan import Plan
from slurm.status import OVER, RunState, read_states

POLL_SECONDS = 2.0
# Workers that end without a result while no run gets any further: then something is wrong with every worker.
MAX_FRUITLESS = 6
# Workers are never timed out by submitit: a run's length is its own business.
_FOREVER_MINUTES = 60 * 24 * 365


class WorkersFail(RuntimeError):
    """Workers die before they get anything done."""


@dataclass
class Stop:
    """What a signal asked of the launcher: first to stop cleanly, the second time at once."""

    signum: int = 0
    times: int = 0

    def ask(self, signum: int, _: Any = None) -> None:
        self.signum, self.times = signum, self.times + 1


@contextmanager
def catching_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM become a wish that the loop looks at; the handlers before are put back at the end."""
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def queue_of(plan: Plan, runs_dir: Path, launch_id: str) -> Queue:
    """The plan's runs by trunk, as workers take them."""
    trunks = {group[0].spec.trunk_id: [run.spec.id for run in group] for group in plan.trunks}
    return Queue(launch_id, plan.sweep.name, str(runs_dir), trunks)


def prepare(
    plan: Plan,
    runs_dir: Path,
    launch_id: str,
    retry_failed: bool,
    max_gpu_hours: float = 0.0,
    others: Sequence[str] = (),
) -> Queue:
    """Writes every unfinished run's spec and placement, and the queue that workers read.

    `others` are runs of the sweep that the plan leaves out, whose hours count as well.
    Raises InvalidInput when a folder holds another spec than its name says: then its results cannot be trusted.
    """
    for group in plan.trunks:
        held = claim.is_held(layout.trunk_claim(runs_dir, group[0].spec.trunk_id))
        for run in group:
            folder = RunFolder(runs_dir / run.spec.id)
            if folder.record is None:
                there = folder.path / "spec.json"
                if there.exists() and read_run_spec(there) != run.spec:
                    raise InvalidInput(f"{there}: describes another run than its folder's name; delete {folder.path}")
                write_atomic(there, to_json(run.spec))
                path = folder.path / "placement.json"
                write_json(path, {**asdict(run.placement), **(_kept(path) if held else {})})
                if retry_failed and folder.status.get("state") == "failed":
                    folder.set_status("queued")
    # The mirror reads from here which experiment a run belongs to; a filtered launch takes no run out of it.
    members = runs_dir / "sweeps" / f"{plan.sweep.name}.json"
    before = (read_json(members) or {}).get("runs", [])
    write_json(members, {"runs": list(dict.fromkeys([*before, *(run.spec.id for run in plan.runs)]))})
    queue = replace(queue_of(plan, runs_dir, launch_id), max_gpu_hours=max_gpu_hours, others=list(others))
    queue.save()
    return queue


def _kept(path: Path) -> dict[str, Any]:
    """Of a placement that some worker is at work with: it has the devices of its own launch, not of a later one."""
    return {key: value for key, value in (read_json(path) or {}).items() if key not in ("branch_steps", "assets")}


@dataclass
class Workers:
    """The workers that this launcher started, by slot."""

    machine: Machine
    queue: Queue
    execute: Execute = execute
    jobs: dict[int, LocalJob[None]] = field(default_factory=dict)
    fruitless: int = 0

    @property
    def runs_dir(self) -> Path:
        return Path(self.queue.runs_dir)

    def keep_busy(self, states: list[RunState]) -> None:
        """Starts a worker in every free slot for which there is an unclaimed trunk."""
        self._bury()
        open_trunks = {state.planned.spec.trunk_id for state in states if state.state not in OVER}
        waiting = sum(not claim.is_held(layout.trunk_claim(self.runs_dir, trunk)) for trunk in open_trunks)
        # A worker that has just been started has no claim yet, but will take one of the waiting trunks.
        waiting -= sum("trunk" not in (self._slot(number) or {}) for number in self.jobs)
        for number in range(self.machine.workers):
            if waiting > 0 and number not in self.jobs and self._slot(number) is None:
                self.jobs[number] = self._start(number)
                waiting -= 1

    def progressed(self) -> None:
        """Some run got further, so workers as such are well."""
        self.fruitless = 0

    def stop(self, hard: bool = False) -> None:
        """Asks the workers of this launch, and those left over by dead launches of the sweep, to stop."""
        for pid in self._pids():
            send(pid, signal.SIGKILL if hard else signal.SIGTERM)

    def any_alive(self) -> bool:
        return bool(self._pids())

    def _pids(self) -> set[int]:
        """By slot, and below submitit's controllers: a worker that starts, or hangs at its end, holds no slot."""
        slots = [claim.holder(path) for path in layout.slots(self.runs_dir)]
        pids = {facts["pid"] for facts in slots if facts and facts.get("sweep") == self.queue.sweep
                and self._ours(facts["launch"])}  # fmt: skip
        for job in self.jobs.values():
            with suppress(psutil.NoSuchProcess):
                pids |= {child.pid for child in psutil.Process(int(job.job_id)).children()}
        return pids

    def _ours(self, launch_id: str) -> bool:
        return launch_id == self.queue.launch_id or not claim.is_held(layout.launch(self.runs_dir, launch_id))

    def _slot(self, number: int) -> dict[str, Any] | None:
        return claim.holder(layout.slot(self.runs_dir, number))

    def _bury(self) -> None:
        for number, job in list(self.jobs.items()):
            if job.done():
                del self.jobs[number]
                if not job.paths.result_pickle.exists() or job.exception() is not None:
                    self.fruitless += 1
                    if self.fruitless >= MAX_FRUITLESS:
                        raise WorkersFail(_last_line(job))

    def _start(self, number: int) -> LocalJob[None]:
        executor = LocalExecutor(layout.worker_logs(self.runs_dir))
        gpus = self.machine.gpus[number : number + 1]
        executor.update_parameters(timeout_min=_FOREVER_MINUTES, gpus_per_node=len(gpus), visible_gpus=gpus)
        # Neither the terminal's Ctrl-C nor its closing: the launcher alone stops them, cleanly.
        with deaf(signal.SIGINT, signal.SIGHUP), _environment(self.machine.profile.environment):
            job = executor.submit(work, str(self.queue.path), number, self.execute)
        assert isinstance(job, LocalJob)
        return job


def supervise(
    plan: Plan, workers: Workers, stop: Stop, show: Callable[[list[RunState]], None], mirror: Mirror | None = None
) -> list[RunState]:
    """Keeps workers busy, and the mirror alive, until every run is over or a signal came; returns the last states.

    Raises WorkersFail when workers keep dying without getting anything done, and UsedUp when the sweep's hours do not
    last; the workers stop by themselves then.
    """
    runs_dir, budget = workers.runs_dir, workers.queue.budget
    mark: list[Any] = []
    states: list[RunState] = []
    while True:
        used_up = budget.exceeded(age=0)
        ended = used_up and not workers.any_alive()
        states = read_states(plan, runs_dir, states)
        show(states)
        if all(state.state in OVER for state in states):
            return states
        if stop.times:
            _wind_down(workers, stop)
            return read_states(plan, runs_dir)
        if (seen := [(state.state, state.step) for state in states]) != mark:
            mark = seen
            workers.progressed()
        if ended:
            raise UsedUp(budget.reason)
        if not used_up:
            workers.keep_busy(states)
        if mirror is not None:
            mirror.keep_alive()
        _pause(stop)


def _wind_down(workers: Workers, stop: Stop) -> None:
    """Waits for stopped workers; kills what does not stop in time, or at once when asked a second time."""
    asked = stop.times
    deadline = time.monotonic() + 1.5 * STOP_SECONDS
    while workers.any_alive():
        # Asked again and again: a worker that was just starting did not hear the first time.
        workers.stop(hard=stop.times > asked or time.monotonic() > deadline)
        time.sleep(0.2)


def _pause(stop: Stop) -> None:
    deadline = time.monotonic() + POLL_SECONDS
    while time.monotonic() < deadline and not stop.times:
        time.sleep(0.1)


def cancel(runs_dir: Path, sweep: str) -> int:
    """Stops all launchers and workers of a sweep on this machine; returns how many processes were asked.

    Launchers go first, since a living one would start its workers again.
    """
    asked = 0
    for paths in (layout.launches(runs_dir), layout.slots(runs_dir)):
        mine = [path for path in paths if _pid_here(path, sweep)]
        for number, patience in ((signal.SIGTERM, 3 * STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            for path in mine:
                if pid := _pid_here(path, sweep):
                    asked += number == signal.SIGTERM
                    send(pid, number)
            deadline = time.monotonic() + patience
            while any(claim.is_held(path) for path in mine) and time.monotonic() < deadline:
                time.sleep(0.1)
    return asked


def elsewhere(runs_dir: Path, sweep: str) -> dict[str, list[str]]:
    """By machine, the launches and slots of a sweep that `cancel` does not reach from here."""
    found: dict[str, list[str]] = {}
    for path in (*layout.launches(runs_dir), *layout.slots(runs_dir, everywhere=True)):
        facts = claim.holder(path) or {}
        host = facts.get("host", "a machine that it does not name")
        if facts.get("sweep") == sweep and host != socket.gethostname():
            found.setdefault(host, []).append(path.stem)
    return found


def _pid_here(path: Path, sweep: str) -> int | None:
    """Of the sweep's process on this machine that holds a claim: while it does, no other process has its number."""
    facts = claim.holder(path) or {}
    return facts["pid"] if (facts.get("sweep"), facts.get("host")) == (sweep, socket.gethostname()) else None


def send(pid: int, number: int) -> None:
    """Signals a process that may be gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables that a child must find before its first import."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _last_line(job: LocalJob[None]) -> str:
    text = (job.stderr() or "").strip() or (job.stdout() or "").strip() or "no output"
    return f"workers end before they get anything done: {text.splitlines()[-1]} ({job.paths.stderr})"
