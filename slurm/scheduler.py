"""What SLURM says of the tasks that were submitted for a run folder.

A file of ours names the trunks of every task before sbatch is called, and the job carries that file's name as its
comment. So a launcher that dies between the two, or after them, leaves nothing that the next one does not find.
"""

from __future__ import annotations

import contextlib
import getpass
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fluidscale.record import read_json, write_json
from fluidscale.spec import InvalidInput
from slurm import claim, layout
from slurm.status import OVER, RunState, read_state

# Another launch may be submitting: a thousand tasks take it some seconds.
_LOCK_SECONDS = 120.0
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


class NoScheduler(InvalidInput):
    """No SLURM can be asked from here."""


@dataclass(frozen=True)
class Task:
    """One task of an array as squeue shows it."""

    job_id: str
    state: str  # SLURM's word: PENDING, RUNNING, COMPLETING, ...


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


def announce(runs_dir: Path, sweep: str, stage: str, tasks: Sequence[Sequence[str]]) -> str:
    """Writes down which trunks each task of an array is about to have; returns the comment that its job must carry."""
    comment = f"fluidscale-{uuid.uuid4().hex[:12]}"
    facts = {"sweep": sweep, "stage": stage, "tasks": tasks, "job": None, "at": time.time()}
    write_json(layout.submissions(runs_dir) / f"{comment}.json", facts)
    return comment


def submitted(runs_dir: Path, comment: str, job_id: str) -> None:
    """Adds the job's number, by which accounting finds it when it has left the queue."""
    path = layout.submissions(runs_dir) / f"{comment}.json"
    write_json(path, {**(read_json(path) or {}), "job": job_id.partition("_")[0], "at": time.time()})


def adopt(runs_dir: Path) -> None:
    """Settles what launches that died between announcing a job and hearing its number have left.

    Their sbatch may outlive them: it is waited for, so that nothing is submitted twice.
    """
    while True:
        orphans = {comment: file for comment, file in _announced(runs_dir).items() if file["job"] is None}
        if not orphans:
            return
        numbers = {comment: job_id for job_id, _, comment in _queue()}
        for comment in orphans.keys() & numbers.keys():
            submitted(runs_dir, comment, numbers[comment])
        if not any(time.time() - file["at"] < _SBATCH_SECONDS for comment, file in orphans.items()
                   if comment not in numbers):  # fmt: skip
            return
        time.sleep(1)


def live(runs_dir: Path, sweep: str | None = None) -> dict[tuple[str, str], Task]:
    """The task in the queue (waiting or running) of each (stage, trunk); a last job's trunk is its sweep's name.

    Raises NoScheduler when squeue does not answer.
    """
    announced = _announced(runs_dir, sweep)
    found: dict[tuple[str, str], Task] = {}
    for job_id, state, comment in _queue() if announced else ():
        if comment in announced:
            file = announced[comment]
            for trunk_id in file["tasks"][_index(job_id)]:
                found[file["stage"], trunk_id] = Task(job_id, state)
    return found


def reconcile(states: list[RunState], runs_dir: Path) -> list[RunState]:
    """Files say what a run last did; SLURM says whether anything will go on with it. Without SLURM files must do."""
    last = _last_jobs(runs_dir)
    if not last:
        return states
    try:
        tasks = live(runs_dir)
    except NoScheduler:
        return states
    queue = {trunk_id: task for (stage, trunk_id), task in tasks.items() if stage != CONCLUDE}
    working = {task.job_id for task in queue.values() if task.state != "PENDING"}
    # A run without a folder was never submitted, though its trunk may have been, for others.
    unsettled = [
        state
        for state in states
        if state.state not in (*OVER, "planned")
        and state.planned.spec.trunk_id in last
        and (state.state != "running" or (state.job and state.job not in working))
    ]
    gone = {last[s.planned.spec.trunk_id] for s in unsettled if s.planned.spec.trunk_id not in queue}
    ends = _ends(gone) if gone else {}
    settled = {s.planned.spec.id: _settle(s, queue, last, ends, runs_dir) for s in unsettled}
    return [settled.get(state.planned.spec.id, state) for state in states]


def _settle(
    state: RunState, queue: dict[str, Task], last: dict[str, str], ends: dict[str, str], runs_dir: Path
) -> RunState:
    trunk_id = state.planned.spec.trunk_id
    if trunk_id in queue:
        return replace(state, state="queued", error=None)
    # Between the reading of its files and that of the queue a run may have come to its end.
    latest = read_state(state.planned, runs_dir)
    if latest.state in OVER:
        return latest
    job_id = last[trunk_id]
    end = ends.get(job_id) or ends.get(job_id.partition("_")[0]) or "is gone"
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
    tasks = sorted({task.job_id for task in live(runs_dir, sweep).values()})
    if not tasks:
        return 0
    scancel(tasks)
    deadline = time.monotonic() + _END_SECONDS
    while live(runs_dir, sweep) and time.monotonic() < deadline:
        time.sleep(0.5)
    return len(tasks)


def scancel(job_ids: Sequence[str]) -> None:
    """Cancels tasks; does not wait for their end."""
    for first in range(0, len(job_ids), 500):
        _ask("scancel", *job_ids[first : first + 500])


def _queue() -> Iterator[tuple[str, str, str]]:
    """(id, state, comment) of each of this user's tasks in the queue."""
    for line in _ask("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%k").splitlines():
        job_id, state, comment = line.split("|", 2)
        yield job_id, state, comment


def _announced(runs_dir: Path, sweep: str | None = None) -> dict[str, dict]:
    paths = layout.submissions(runs_dir).glob("fluidscale-*.json")
    # Files of older submissions name no stage.
    files = {path.stem: {"stage": "whole", **(read_json(path) or {})} for path in paths}
    return {comment: file for comment, file in files.items() if sweep in (None, file["sweep"])}


def _last_jobs(runs_dir: Path) -> dict[str, str]:
    """The newest task of each trunk that was ever submitted."""
    files = [file for file in _announced(runs_dir).values() if file["job"] and file["stage"] != CONCLUDE]
    last = {}
    for file in sorted(files, key=lambda file: file["at"]):
        for index, trunk_ids in enumerate(file["tasks"]):
            job_id = f"{file['job']}_{index}" if len(file["tasks"]) > 1 else file["job"]
            last |= dict.fromkeys(trunk_ids, job_id)
    return last


def _ends(job_ids: set[str]) -> dict[str, str]:
    """How jobs ended, by accounting; tasks that never started are listed under their array. Empty without sacct."""
    numbers = ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))
    ends: dict[str, str] = {}
    with contextlib.suppress(NoScheduler):
        for line in _ask("sacct", "-n", "-P", "-X", "-j", numbers, "-o", "JobID,State").splitlines():
            job_id, _, state = line.partition("|")
            ends[re.sub(r"_\[.*", "", job_id)] = state
    return ends


def _index(job_id: str) -> int:
    """The place of a task in its array; a single task is submitted without one."""
    return int(job_id.partition("_")[2] or 0)


def _ask(*command: str, patience: float = _ANSWER_SECONDS) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
    except FileNotFoundError as error:
        raise NoScheduler(f"{command[0]}: not found; --cluster slurm works where SLURM's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise NoScheduler(f"{command[0]}: no answer in {patience:.0f} s; try again later") from error
    if answer.returncode:
        raise NoScheduler(f"{command[0]}: {answer.stderr.strip() or 'failed'}")
    return answer.stdout
