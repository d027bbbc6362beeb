"""What SLURM says of the tasks that were submitted for a run folder.

A file of ours names the trunks of every task before sbatch is called, and the job carries that file's name as its
comment. So a launcher that dies between the two, or after them, leaves nothing that the next one does not find.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fluidscale.folder import RunFolder
from fluidscale.record import read_json, write_json
from fluidscale.spec import InvalidInput
from slurm import claim, layout
from slurm.job import EVALUATE, TRAIN, WHOLE, is_over
from slurm.status import OVER, RunState, read_state

# Another launch may be submitting: a thousand tasks take it some seconds.
_LOCK_SECONDS = 300.0
# A client of a busy controller waits this long by itself.
_ANSWER_SECONDS = 60.0
# From scancel to the last process of a job (slurm.conf, KillWait) and its epilogue.
_END_SECONDS = 120.0
# From a launcher's death to the moment when its sbatch must be in the queue.
_SBATCH_SECONDS = 30.0
# A job that is being preempted has no more time than this for a question.
_WORKER_SECONDS = 10.0
# The stage of a sweep's last job; the stages of its runs are those of slurm.job.
CONCLUDE = "conclude"
# What a task of a stage does for its trunks.
_DOES = {WHOLE: (TRAIN, EVALUATE), TRAIN: (TRAIN,), EVALUATE: (EVALUATE,), CONCLUDE: ()}
# SLURM's words for a job that will do nothing any more (squeue's manual, JOB STATE CODES).
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
          "TIMEOUT"}  # fmt: skip
# What its clients take from the environment beside their arguments (ENVIRONMENT VARIABLES of their manuals): other
# tasks, another cluster or other times than those that are asked for, or a question back.
_CLIENTS_OWN = ("SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS")
# Why a task waits that will start by itself (squeue's manual, JOB REASON CODES); anything else is told.
_PATIENCE = {"None", "Priority", "Resources", "Dependency", "JobArrayTaskLimit", "BeginTime", "Cleaning"}
# A stage, a trunk, and one of the runs that a task has of it. The run is empty for a last job, whose trunk is its
# command, and for all runs of a submission that is too old to name them.
Work = tuple[str, str, str]
T = TypeVar("T")


class NoScheduler(InvalidInput):
    """No SLURM can be asked from here."""


@dataclass(frozen=True)
class Task:
    """One task of an array as squeue shows it."""

    job_id: str
    state: str  # SLURM's word: PENDING, RUNNING, COMPLETING, ...
    reason: str = ""  # SLURM's word for why it does not start

    @property
    def held(self) -> str | None:
        """What keeps it from starting by itself, if anything does."""
        waits = self.state == "PENDING" and self.reason not in _PATIENCE
        return f"job {self.job_id} waits: {self.reason}" if waits and self.reason else None


@contextmanager
def submitting(runs_dir: Path) -> Iterator[None]:
    """One launch at a time looks at the queue and adds to it. Raises InvalidInput when another does not end."""
    if shutil.which("sbatch") is None:
        raise NoScheduler("sbatch: not found; --cluster slurm submits where SLURM's commands are (a login node)")
    path, deadline = layout.submitting(runs_dir), time.monotonic() + _LOCK_SECONDS
    while (held := claim.take(path, {})) is None:
        if time.monotonic() > deadline:
            raise InvalidInput(f"{path}: another launch has been submitting for {_LOCK_SECONDS:.0f} s; try again later")
        time.sleep(0.2)
    try:
        yield
    finally:
        held.release()


def announce(
    runs_dir: Path, sweep: str, stage: str, tasks: Sequence[Sequence[str]], runs: Mapping[str, Sequence[str]]
) -> str:
    """Writes down which trunks each task of an array is about to have, and which runs of each; returns the comment that
    its job must carry.
    """
    comment = f"fluidscale-{uuid.uuid4().hex[:12]}"
    facts = {"sweep": sweep, "stage": stage, "tasks": tasks, "runs": dict(runs), "job": None, "at": time.time()}
    write_json(layout.submissions(runs_dir) / f"{comment}.json", facts)
    return comment


def submitted(runs_dir: Path, comment: str, job_id: str) -> None:
    """Adds the job's number, by which accounting finds it when it has left the queue."""
    path = layout.submissions(runs_dir) / f"{comment}.json"
    write_json(path, {**(read_json(path) or {}), "job": job_id.partition("_")[0], "at": time.time()})


def withdraw(runs_dir: Path, comment: str) -> None:
    """Takes an announcement back: sbatch refused the job."""
    (layout.submissions(runs_dir) / f"{comment}.json").unlink(missing_ok=True)


def adopt(runs_dir: Path) -> None:
    """Settles what launches that died between announcing a job and hearing its number have left.

    Their sbatch may outlive them: it is waited for, so that nothing is submitted twice.
    """
    while True:
        orphans = {comment: file for comment, file in _announced(runs_dir).items() if file["job"] is None}
        if not orphans:
            return
        numbers = {comment: task.job_id.partition("_")[0] for task, comment in _queue()}
        for comment in orphans.keys() & numbers.keys():
            if _can_begin(runs_dir, numbers[comment], len(orphans[comment]["tasks"])):
                submitted(runs_dir, comment, numbers[comment])
            else:
                scancel([numbers[comment]])
                _until(lambda comment=comment: comment not in {other for _, other in _queue()})
                withdraw(runs_dir, comment)
        if not any(time.time() - file["at"] < _SBATCH_SECONDS for comment, file in orphans.items()
                   if comment not in numbers):  # fmt: skip
            return
        time.sleep(1)


def _can_begin(runs_dir: Path, number: str, tasks: int) -> bool:
    """Whether every task of a job finds what it is to do: submitit names those files when sbatch has answered."""
    ids = [f"{number}_{index}" for index in range(tasks)] if tasks > 1 else [number]
    return all((layout.worker_logs(runs_dir) / f"{job_id}_submitted.pkl").exists() for job_id in ids)


def live(runs_dir: Path) -> dict[Work, Task]:
    """The task in the queue (waiting or running) of each work.

    Raises NoScheduler when squeue does not answer.
    """
    found: dict[Work, Task] = {}
    for task, file in _tasks(runs_dir):
        for work in _works(file, _index(task.job_id)):
            # Of two tasks with the same run, one waits for the other.
            if work not in found or found[work].state != "RUNNING":
                found[work] = task
    return found


def settled(runs_dir: Path, trunks: Collection[str]) -> dict[Work, Task]:
    """As `live`, once no task of these trunks is about to end: a cancelled one does nothing more, a requeued one
    will be back in the queue.

    Raises InvalidInput when one does not end.
    """

    def ending() -> set[str]:
        return {task.job_id for (_, trunk, _), task in live(runs_dir).items()
                if task.state == "COMPLETING" and trunk in trunks}  # fmt: skip

    _until(lambda: not ending())
    if left := ending():
        raise InvalidInput(f"SLURM has been ending {', '.join(sorted(left))} for {_END_SECONDS:.0f} s; try again later")
    return live(runs_dir)


def awaited(tasks: Mapping[Work, Task]) -> dict[Work, Task]:
    """The task that will train, and the one that will evaluate, by run."""
    return {(does, trunk, run): task for (stage, trunk, run), task in tasks.items() for does in _DOES[stage]}


def of_run(known: Mapping[Work, T], stage: str, trunk_id: str, run_id: str) -> T | None:
    """What is known of one stage of a run."""
    return known.get((stage, trunk_id, run_id), known.get((stage, trunk_id, "")))


def reconcile(states: list[RunState], runs_dir: Path) -> list[RunState]:
    """Files say what a run last did; SLURM says whether anything will go on with it. Without SLURM files must do."""
    last = _last_jobs(runs_dir)
    if not last:
        return states
    try:
        tasks = live(runs_dir)
    except NoScheduler:
        return states
    working = {task.job_id for task in tasks.values() if task.state != "PENDING"}
    # A run that no task has was never submitted, though its trunk may have been, for others.
    unsettled = [
        state
        for state in states
        if state.state not in (*OVER, "planned")
        and any(_of(last, state, stage) for stage in (TRAIN, EVALUATE))
        and (state.state != "running" or (state.job and state.job not in working))
    ]
    expected = awaited(tasks)
    # Files are read after the queue: what a task did before it left is there.
    stages = [_next(state, runs_dir, last) for state in unsettled]
    works = [
        (state, _of(last, state, stage) or "", _of(expected, state, stage))
        for state, stage in zip(unsettled, stages, strict=True)
    ]
    gone = {job_id for _, job_id, task in works if task is None}
    ends: dict[str, str] = {}
    with contextlib.suppress(NoScheduler):
        ends = _ends(gone) if gone else {}
    settled = {
        state.planned.spec.id: replace(state, state="queued", error=task.held)
        if task
        else _without(state, job_id, ends, runs_dir)
        for state, job_id, task in works
    }
    return [settled.get(state.planned.spec.id, state) for state in states]


def _of(known: Mapping[Work, T], state: RunState, stage: str) -> T | None:
    return of_run(known, stage, state.planned.spec.trunk_id, state.planned.spec.id)


def _next(state: RunState, runs_dir: Path, last: Mapping[Work, str]) -> str:
    """What a run waits for: its training, or when it has its weights, their evaluation.

    A task that only evaluates makes nothing of a run whose training was cancelled, though it may still be in the queue.
    """
    trained = is_over(RunFolder(runs_dir / state.planned.spec.id), TRAIN)
    stages = (EVALUATE, TRAIN) if trained else (TRAIN, EVALUATE)
    return next(stage for stage in stages if _of(last, state, stage))


def _without(state: RunState, job_id: str, ends: Mapping[str, str], runs_dir: Path) -> RunState:
    """A run whose job has left the queue, without having finished it or just when it had."""
    latest = read_state(state.planned, runs_dir)
    if latest.state in OVER:
        return latest
    end = ends.get(job_id, "is gone")
    error = f"job {job_id}: {end}; the same command continues"
    return replace(state, state="stopped" if end.startswith("CANCELLED") else "lost", error=error)


def job_facts(job_id: str) -> dict[str, str]:
    """What the controller knows of a job (`scontrol show job`); empty when it does not answer at once."""
    if not job_id:
        return {}
    try:
        words = _ask("scontrol", "show", "job", "-o", job_id, patience=_WORKER_SECONDS).split()
    except NoScheduler:
        return {}
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def cancel(runs_dir: Path, sweep: str) -> int:
    """Cancels the sweep's tasks and waits until the last has left; returns how many there were."""
    tasks = sorted({task.job_id for task, _ in _tasks(runs_dir, sweep)})
    if not tasks:
        return 0
    scancel(tasks)
    _until(lambda: not _tasks(runs_dir, sweep))
    return len(tasks)


def _until(over: Callable[[], bool]) -> None:
    """Waits for the end of tasks, not longer than SLURM may take to end one."""
    deadline = time.monotonic() + _END_SECONDS
    while not over() and time.monotonic() < deadline:
        time.sleep(1)


def scancel(job_ids: Sequence[str]) -> None:
    """Cancels tasks; does not wait for their end."""
    for first in range(0, len(job_ids), 500):
        _ask("scancel", *job_ids[first : first + 500])


def _queue() -> Iterator[tuple[Task, str]]:
    """Each of this user's tasks in the queue, and its comment."""
    for line in _ask("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%r|%k").splitlines():
        job_id, state, reason, comment = line.split("|", 3)
        yield Task(job_id, state, reason), comment


def _tasks(runs_dir: Path, sweep: str | None = None) -> list[tuple[Task, dict]]:
    """Each task in the queue of a run folder, and what was announced of its array."""
    announced = _announced(runs_dir, sweep)
    return [(task, announced[comment]) for task, comment in _queue() if comment in announced] if announced else []


def _works(file: dict, index: int) -> Iterator[Work]:
    """What one task of an announced array has to do."""
    for trunk_id in file["tasks"][index]:
        for run_id in file["runs"].get(trunk_id, [""]):
            yield file["stage"], trunk_id, run_id


def _announced(runs_dir: Path, sweep: str | None = None) -> dict[str, dict]:
    paths = layout.submissions(runs_dir).glob("fluidscale-*.json")
    # Files of older submissions name no stage, or no runs.
    files = {path.stem: {"stage": "whole", "runs": {}, **(read_json(path) or {})} for path in paths}
    return {comment: file for comment, file in files.items() if sweep in (None, file["sweep"])}


def _last_jobs(runs_dir: Path) -> dict[Work, str]:
    """The newest task that was ever submitted for the training, and for the evaluation, of each run."""
    files = [file for file in _announced(runs_dir).values() if file["job"] and file["stage"] != CONCLUDE]
    last = {}
    for file in sorted(files, key=lambda file: file["at"]):
        for index in range(len(file["tasks"])):
            job_id = f"{file['job']}_{index}" if len(file["tasks"]) > 1 else file["job"]
            works = _works(file, index)
            last |= {(does, trunk, run): job_id for stage, trunk, run in works for does in _DOES[stage]}
    return last


def _ends(job_ids: set[str]) -> dict[str, str]:
    """How jobs that have left the queue ended; unknown ones are left out.

    The controller knows at once, and for some minutes (slurm.conf, MinJobAge). Accounting is told seconds later, and
    says until then that a job waits or runs: it is asked only for what the controller has forgotten.
    """
    known = _listed("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%T")
    ends = _ended(known)
    forgotten = {job_id: job_id.partition("_")[0] for job_id in job_ids - ends.keys()}
    if not forgotten:
        return ends
    numbers = ",".join(sorted(set(forgotten.values())))
    try:
        told = _listed("sacct", "-n", "-P", "-X", "-j", numbers, "-o", "JobID,State")
    except NoScheduler:
        return ends
    arrays = {job_id.partition("_")[0] for job_id in (*known, *told)}
    # A task that is cancelled before it starts leaves no trace; every other one has an entry beside its array's.
    silent = {job_id for job_id, array in forgotten.items() if array in arrays and job_id not in told}
    return dict.fromkeys(silent, "CANCELLED") | _ended(told) | ends


def _ended(states: Mapping[str, str]) -> dict[str, str]:
    return {job_id: state for job_id, state in states.items() if state.partition(" ")[0] in _ENDED}


def _listed(*command: str) -> dict[str, str]:
    """The states that a client program lists, `job|state` a line."""
    return dict(line.split("|", 1) for line in _ask(*command).splitlines())


def _index(job_id: str) -> int:
    """The place of a task in its array; a single task is submitted without one."""
    return int(job_id.partition("_")[2] or 0)


def _ask(*command: str, patience: float = _ANSWER_SECONDS) -> str:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(_CLIENTS_OWN)}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False, env=plain)
    except FileNotFoundError as error:
        raise NoScheduler(f"{command[0]}: not found; --cluster slurm works where SLURM's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise NoScheduler(f"{command[0]}: no answer in {patience:.0f} s; try again later") from error
    if answer.returncode:
        raise NoScheduler(f"{command[0]}: {answer.stderr.strip() or 'failed'}")
    return answer.stdout
