"""Submission to SLURM through submitit: trunks are tasks of arrays, an array a placement and stage.

    training  ->  evaluation, where it has jobs of its own  ->  the sweep's last job: mirror, collect, fit, report

Everything here can be said again: what is in the queue already, or finished, is not submitted a second time.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env

from fluidscale.folder import RunFolder
from fluidscale.record import git_revision
from fluidscale.spec import InvalidInput
from slurm import layout, scheduler
from slurm.job import EVALUATE, TRAIN, WHOLE, Queue, is_over
from slurm.placement import Profile
from slurm.plan import Plan
from slurm.snapshot import snapshot
from slurm.task import NOTICE_SECONDS, Conclusion, TrunkTask

# Most clusters allow arrays of at most 1001 tasks (slurm.conf, MaxArraySize).
_ARRAY_TASKS = 1000
# In the last ten minutes of a job every preemption looks like a time-out to submitit, which allows three of them.
_TIMEOUTS = 1_000_000
# A notice, or the SIGTERM of a preemption, that comes before Python can hear it would kill the task, and SLURM does not
# requeue what ended by itself. Whom it cancels, or preempts, it kills a little later all the same.
_DEAF_AT_FIRST = f'sh -c \'trap "" USR2 TERM; exec "$0" "$@"\' {shlex.quote(sys.executable)}'
# Of the last job: it reads files and fits curves.
_CONCLUSION_MINUTES = 120
# Parameters of sbatch that say where a job goes; what a profile leaves open, the user's environment may say.
_WHERE = ("partition", "account", "qos", "constraint")
# What sbatch says of an array that is larger than the cluster (MaxArraySize) or its policy allows.
_TOO_MANY = ("array spec", "submit limit")


@dataclass(frozen=True)
class Array:
    """One sbatch call: tasks, each of some trunks, on one placement in one stage."""

    profile: Profile
    stage: str
    tasks: tuple[tuple[str, ...], ...]
    after: str = ""  # sbatch's --dependency

    def parameters(self) -> dict[str, Any]:
        """Of sbatch, as submitit takes them."""
        profile, several = self.profile, self.profile.nodes * self.profile.devices > 1
        named = {key: getattr(profile, key) for key in _WHERE}
        known = {
            **{key: value for key, value in named.items() if value},
            **({} if profile.device == "cpu" else {"gpus_per_node": profile.devices}),
            **({"nodes": profile.nodes, "ntasks_per_node": profile.devices} if several else {}),
            "time": profile.minutes,
            "cpus_per_task": profile.threads,
            "array_parallelism": profile.parallel,
            # At most a quarter of the job's time: a notice at its start would leave none to work in.
            "signal_delay_s": self.notice,
            # Since 22.05 srun no longer takes this over from sbatch.
            "srun_args": [f"--cpus-per-task={profile.threads}", *(["--kill-on-bad-exit=1"] if several else [])],
            **({"dependency": self.after} if self.after else {}),
        }
        # A cluster whose slurm.conf says JobRequeue=0 puts back into its queue only what asked for it.
        more = {"requeue": True, **({"kill_on_invalid_dep": "yes"} if self.after else {})}
        own = {key.replace("-", "_"): value for key, value in (profile.sbatch or {}).items()}
        # submitit names a wckey of its own where it is told nothing.
        silent = {"wckey": None} if "wckey" in own else {}
        known = {key: value for key, value in known.items() if key not in own} | silent
        more = {key: value for key, value in {**more, **own}.items() if value is not None}
        return {**known, "additional_parameters": more}

    @property
    def notice(self) -> int:
        """Seconds before its end at which a task is told of it: a quarter of a short one's minutes."""
        return min(NOTICE_SECONDS, 15 * self.profile.minutes)

    def describe(self, name: str) -> str:
        """What a dry run prints: the lines of its sbatch file that depend on the placement."""
        known = self.parameters()
        lines = {"job-name": name, "signal": f"USR2@{known.pop('signal_delay_s')}"}
        del known["srun_args"]
        throttle = known.pop("array_parallelism")
        if len(self.tasks) > 1:
            lines["array"] = f"0-{len(self.tasks) - 1}%{min(len(self.tasks), throttle)}"
        known |= known.pop("additional_parameters")
        lines |= {key.replace("_", "-"): value for key, value in known.items() if value is not None}
        trunks = sum(len(task) for task in self.tasks)
        head = f"{self.stage}: {trunks} trunks in {len(self.tasks)} tasks of profile {self.profile.name}"
        flags = (key if lines[key] is True else f"{key}={lines[key]}" for key in sorted(lines))
        return "\n".join([head, *(f"#SBATCH --{flag}" for flag in flags)])


def submit(plan: Plan, queue: Queue, conclusion: Sequence[str]) -> list[str]:
    """Submits what is unfinished and not in the queue already; returns the ids of the tasks that train or evaluate.

    `conclusion` are the arguments of the launcher with which the sweep's last job concludes it.
    """
    runs_dir = Path(queue.runs_dir)
    with scheduler.submitting(runs_dir):
        scheduler.adopt(runs_dir)
        there = scheduler.settled(runs_dir, {*queue.trunks, shlex.join(conclusion)})
        new: list[tuple[Array, str]] = []
        for array in arrays(plan, queue, there):
            new.append((array, _submit(queue, _after(queue, array, new, there))))
        # Of a launch with the same words: one of other sizes or arms has a last job, and a table, of its own.
        last = there.get((scheduler.CONCLUDE, shlex.join(conclusion), ""))
        if new or last is None:
            if last is not None:
                # It waits for the tasks of its own launch only.
                scheduler.scancel([last.job_id])
            _submit_conclusion(plan, queue, conclusion, {*(job for _, job in new), *_at_work(queue, there)})
    return [f"{job}_{index}" if len(a.tasks) > 1 else job for a, job in new for index in range(len(a.tasks))]


def arrays(plan: Plan, queue: Queue, there: Mapping[scheduler.Work, scheduler.Task]) -> Iterator[Array]:
    """What is left to submit: training by placement, and for each such array, where evaluation is apart, its own."""
    profiles = {run.spec.trunk_id: plan.machine.profile.of(run.spec.size) for run in plan.runs}
    expected, busy = scheduler.awaited(there), {trunk for _, trunk, _ in there}
    untrained = [trunk for trunk in queue.trunks if _lacks(queue, trunk, TRAIN, expected)]
    for profile, trunk_ids in _by_placement(profiles, untrained, busy):
        for array in _arrays(profile, TRAIN if profile.evaluating else WHOLE, trunk_ids):
            yield array
            if profile.evaluating:
                yield Array(profile.evaluating, EVALUATE, array.tasks)
    trained = [trunk for trunk in queue.trunks if trunk not in set(untrained)]
    unevaluated = [trunk for trunk in trained if _lacks(queue, trunk, EVALUATE, expected)]
    for profile, trunk_ids in _by_placement(profiles, unevaluated, busy):
        # Trained under a profile that evaluates apart, and now under one that does not: the task finds the weights.
        yield from _arrays(profile.evaluating or profile, EVALUATE if profile.evaluating else WHOLE, trunk_ids)


def _lacks(queue: Queue, trunk_id: str, stage: str, expected: Mapping[scheduler.Work, object]) -> bool:
    """Whether a run of the trunk needs its training, or its evaluation, and no task in the queue has it."""
    over = TRAIN if stage == TRAIN else WHOLE
    return any(
        scheduler.of_run(expected, stage, trunk_id, run_id) is None
        and not is_over(RunFolder(Path(queue.runs_dir) / run_id), over)
        for run_id in queue.trunks[trunk_id]
    )


def _arrays(profile: Profile, stage: str, trunk_ids: Sequence[str]) -> Iterator[Array]:
    packs = [tuple(pack) for pack in _chunks(trunk_ids, profile.trunks_per_task)]
    for chunk in _chunks(packs, _ARRAY_TASKS):
        yield Array(profile, stage, tuple(chunk))


def _after(
    queue: Queue, array: Array, new: Sequence[tuple[Array, str]], there: Mapping[scheduler.Work, scheduler.Task]
) -> Array:
    """An evaluation waits for its training, task for task where both are new; and everything for the tasks that have
    other runs of its trunks, since of two that begin together one would find nothing to do.
    """
    mine = {trunk for task in array.tasks for trunk in task}
    jobs = {(stage, task.job_id) for (stage, trunk, _), task in there.items() if trunk in mine}
    before = _afterany({job for stage, job in jobs if (array.stage, stage) != (TRAIN, EVALUATE)})
    training = next((job for other, job in new if other.stage == TRAIN and other.tasks == array.tasks), None)
    if array.stage != EVALUATE or training is None:
        return replace(array, after=before)
    waits = f"{'aftercorr' if len(array.tasks) > 1 else 'afterok'}:{training}"
    return replace(array, after=f"{waits},{before}" if before else waits)


def _afterany(jobs: set[str]) -> str:
    return f"afterany:{':'.join(sorted(jobs))}" if jobs else ""


def _at_work(queue: Queue, there: Mapping[scheduler.Work, scheduler.Task]) -> set[str]:
    """The tasks in the queue that work for this sweep, also those of another sweep that shares a trunk."""
    mine = set(queue.trunks)
    return {task.job_id for (stage, trunk, _), task in there.items() if stage != scheduler.CONCLUDE and trunk in mine}


def _submit(queue: Queue, array: Array) -> str:
    """One sbatch call; returns the job's number."""
    restarts = array.profile.restarts or {}
    # A task has the devices that were asked for with it, whatever a later launch writes into the runs' folders.
    placed = array.profile.placed
    tasks = [TrunkTask(str(queue.path), task, restarts, array.stage, placed, array.notice) for task in array.tasks]
    return _sbatch(queue, array, tasks)


def _submit_conclusion(plan: Plan, queue: Queue, arguments: Sequence[str], jobs: set[str]) -> None:
    profile = plan.machine.profile.of(plan.runs[0].spec.size)
    profile = profile.evaluating or profile
    # It needs no GPU, and nothing that is counted by them.
    plain = {key: value for key, value in (profile.sbatch or {}).items() if key != "gres" and "gpu" not in key}
    minutes = min(_CONCLUSION_MINUTES, profile.minutes)
    profile = replace(profile, device="cpu", nodes=1, devices=1, minutes=minutes, sbatch=plain)
    last = Array(profile, scheduler.CONCLUDE, ((shlex.join(arguments),),), _afterany(jobs))
    _sbatch(queue, last, [Conclusion(arguments, Path.cwd())])


def _sbatch(queue: Queue, array: Array, tasks: Sequence[TrunkTask | Conclusion]) -> str:
    runs_dir = Path(queue.runs_dir)
    runs = {trunk: queue.trunks[trunk] for task in array.tasks for trunk in task if trunk in queue.trunks}
    comment = scheduler.announce(runs_dir, queue.sweep, array.stage, array.tasks, runs)
    executor = SlurmExecutor(layout.worker_logs(runs_dir), max_num_timeout=_TIMEOUTS, python=_DEAF_AT_FIRST)
    name = queue.sweep if array.stage in (WHOLE, TRAIN) else f"{queue.sweep}-{array.stage}"
    executor.update_parameters(
        job_name=name, comment=comment, setup=_setup(runs_dir, array.profile), **array.parameters()
    )
    try:
        # submitit prints what sbatch says, and it is said below.
        with _outside_any_job(array.profile), redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except FailedJobError as error:
        reason = " ".join(str(error).split())
        # A controller that was too slow to answer may have taken the job all the same.
        if "timed out" not in reason:
            scheduler.withdraw(runs_dir, comment)
        way_out = "--resources FILE names your cluster's"
        if any(words in reason for words in _TOO_MANY):
            way_out = f"{len(tasks)} tasks; trunks_per_task packs several trunks into each"
        raise InvalidInput(f"{reason} (profile {array.profile.name}: {way_out})") from error
    job = jobs[0].job_id.partition("_")[0]
    scheduler.submitted(runs_dir, comment, job)
    return job


def _setup(runs_dir: Path, profile: Profile) -> list[str]:
    """What a job's shell does first: the code is that of the submission, and threads are the placement's."""
    code = shlex.quote(str(snapshot(runs_dir)))
    return [
        # Whoever may write where we unpickle, or train from, runs code as us.
        "umask g-w,o-w",
        # Python looks in the working directory first, which was the place of the launch.
        f"cd {code} && export PYTHONPATH={code}",
        f"export FLUIDSCALE_GIT_REV={shlex.quote(git_revision())}",
        *(f"export {name}={value}" for name, value in profile.environment.items()),
    ]


def _by_placement(
    profiles: Mapping[str, Profile], trunk_ids: Sequence[str], busy: Collection[str] = ()
) -> list[tuple[Profile, list[str]]]:
    """Trunks whose sizes are placed alike go into one array; those that are busy go into another, since it waits."""
    groups: list[tuple[Profile, bool, list[str]]] = []
    for trunk_id in trunk_ids:
        kind = (profiles[trunk_id], trunk_id in busy)
        same = next((group for *other, group in groups if tuple(other) == kind), None)
        if same is None:
            groups.append((*kind, [trunk_id]))
        else:
            same.append(trunk_id)
    return [(profile, group) for profile, _, group in groups]


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


@contextmanager
def _outside_any_job(profile: Profile) -> Iterator[None]:
    """A launch from inside a job must not hand that job's SLURM_* on; where the cluster is, it must.

    Of sbatch's own variables those are kept that say where a job goes: they would win over what the profile says too,
    and others would win over the rest of the submission.
    """
    open_ = [f"SBATCH_{key.upper()}" for key in _WHERE if not getattr(profile, key)]
    names = ["SLURM_CONF", "SBATCH_RESERVATION", *open_]
    kept = {name: os.environ[name] for name in names if name in os.environ}
    with clean_env():
        os.environ.update(kept)
        yield
