"""SLURM through submitit: trunks are tasks of arrays, an array a placement, and submitit alone owns their requeue."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit import AutoExecutor
from submitit.helpers import DelayedSubmission, clean_env
from submitit.slurm.slurm import SlurmJobEnvironment

from fluidscale.folder import RunFolder
from fluidscale.record import git_revision
from slurm import layout, scheduler
from slurm.job import Execute, Queue, Stopped, StopSignal, execute, is_over, load_queue, train_trunk
from slurm.placement import Profile
from slurm.plan import Plan
from slurm.snapshot import snapshot

# Most clusters allow arrays of at most 1001 tasks (slurm.conf, MaxArraySize).
_ARRAY_TASKS = 1000
# In the last ten minutes of a job every preemption looks like a time-out to submitit, which allows three of them.
_TIMEOUTS = 1_000_000
# SLURM's notice before a job's time is over: long enough for the step, the checkpoint and the requeue.
_NOTICE_SECONDS = 90
# A requeued task may start before the last process of its former life is dead, and a dead node's locks are freed late.
_HANDOVER_SECONDS = 300.0
# After SIGTERM, SLURM decides what becomes of the job: the end (scancel) or the queue (preemption).
_LAST_WORD_SECONDS = 300.0


class TrunkTask:
    """Trains some trunks of a queue. When SLURM takes the node away, the same task goes back into the queue.

    It carries no state: the runs resume from their newest checkpoint on disk, also after a death without warning.
    """

    def __init__(self, queue_path: str, trunk_ids: Sequence[str], restarts: int, execute: Execute = execute) -> None:
        self.queue_path, self.trunk_ids, self.restarts, self.execute = queue_path, tuple(trunk_ids), restarts, execute

    def __call__(self) -> None:
        if _restarts() > self.restarts:
            raise RuntimeError(f"started {_restarts()} times without coming to its end: given up")
        stop, notice = StopSignal(), _Notice()
        queue = load_queue(Path(self.queue_path))
        try:
            for trunk_id in self.trunk_ids:
                self._train(queue, trunk_id, stop)
        except (Stopped, SystemExit):
            if not stop():
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if stop():
            notice.leave()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit puts back into the queue: the same task."""
        return DelayedSubmission(TrunkTask(self.queue_path, self.trunk_ids, self.restarts, self.execute))

    def _train(self, queue: Queue, trunk_id: str, stop: StopSignal) -> None:
        deadline = time.monotonic() + _HANDOVER_SECONDS
        while not stop() and not train_trunk(queue, trunk_id, None, self.execute, stop):
            if not _restarts() or _finished(queue, trunk_id):
                print(f"{trunk_id}: finished, or in another worker's hands", flush=True)
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{layout.trunk_claim(Path(queue.runs_dir), trunk_id)}: held by another worker")
            time.sleep(1)


class _Notice:
    """SLURM's signals, heard so that nothing is lost: the run stops after its step with a checkpoint, and only then
    submitit, whose handler would have ended the process in mid-step, puts the task back into the queue.
    """

    def __init__(self) -> None:
        number = getattr(signal, f"SIG{SlurmJobEnvironment.USR_SIG}")
        self._number, self._requeue, self._asked = number, signal.getsignal(number), False
        if callable(self._requeue):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True
        signal.raise_signal(signal.SIGTERM)

    def leave(self) -> None:
        """Ends this process, requeued where SLURM gave notice; on a bare SIGTERM SLURM itself has the last word."""
        deadline = time.monotonic() + _LAST_WORD_SECONDS
        while callable(self._requeue) and time.monotonic() < deadline:
            if self._asked:
                self._requeue(self._number, None)
            time.sleep(0.2)
        sys.exit(128 + signal.SIGTERM)


def submit(plan: Plan, queue: Queue, cluster: str) -> list[str]:
    """Submits what is unfinished and not in the queue already; returns the ids of the tasks.

    `cluster` is slurm, or debug: in this process, one by one.
    """
    if cluster == "debug":
        for trunk_id in queue.trunks:
            train_trunk(queue, trunk_id, None, execute, lambda: False)
        return []
    runs_dir = Path(queue.runs_dir)
    with scheduler.submitting(runs_dir):
        there = scheduler.live(runs_dir)
        waiting = [trunk for trunk in queue.trunks if trunk not in there and not _finished(queue, trunk)]
        tasks = []
        for profile, trunk_ids in _by_placement(plan, waiting):
            packs = _chunks(trunk_ids, profile.trunks_per_task)
            for chunk in _chunks(packs, _ARRAY_TASKS):
                tasks += _submit_array(queue, chunk, profile)
        return tasks


def _submit_array(queue: Queue, packs: Sequence[Sequence[str]], profile: Profile) -> list[str]:
    runs_dir = Path(queue.runs_dir)
    comment = scheduler.announce(runs_dir, queue.sweep, packs)
    executor = AutoExecutor(layout.worker_logs(runs_dir), cluster="slurm", slurm_max_num_timeout=_TIMEOUTS)
    executor.update_parameters(
        name=queue.sweep, slurm_comment=comment, slurm_setup=_setup(runs_dir, profile), **_parameters(profile)
    )
    with _outside_any_job(), executor.batch():
        jobs = [executor.submit(TrunkTask(str(queue.path), pack, profile.restarts)) for pack in packs]
    scheduler.submitted(runs_dir, comment, jobs[0].job_id)
    return [job.job_id for job in jobs]


def _setup(runs_dir: Path, profile: Profile) -> list[str]:
    """What a job's shell does first: the code is that of the submission, and threads are the placement's."""
    code = shlex.quote(str(snapshot(runs_dir)))
    return [
        # Python looks in the working directory first, which was the place of the launch.
        f"cd {code} && export PYTHONPATH={code}",
        f"export FLUIDSCALE_GIT_REV={shlex.quote(git_revision())}",
        f"export OMP_NUM_THREADS={profile.threads}",
    ]


def _parameters(profile: Profile) -> dict[str, Any]:
    """Of sbatch, in submitit's spelling."""
    named = {f"slurm_{key}": getattr(profile, key) for key in ("partition", "account", "qos", "constraint")}
    return {
        **{key: value for key, value in named.items() if value},
        **({} if profile.device == "cpu" else {"gpus_per_node": 1}),
        "timeout_min": profile.minutes,
        "cpus_per_task": profile.threads,
        "slurm_array_parallelism": profile.parallel,
        "slurm_signal_delay_s": _NOTICE_SECONDS,
        # Since 22.05 srun no longer takes this over from sbatch.
        "slurm_srun_args": [f"--cpus-per-task={profile.threads}"],
    }


def _by_placement(plan: Plan, trunk_ids: Sequence[str]) -> list[tuple[Profile, list[str]]]:
    """Trunks whose sizes are placed alike go into one array."""
    profiles = {run.spec.trunk_id: plan.machine.profile.of(run.spec.size) for run in plan.runs}
    groups: list[tuple[Profile, list[str]]] = []
    for trunk_id in trunk_ids:
        same = next((group for profile, group in groups if profile == profiles[trunk_id]), None)
        if same is None:
            groups.append((profiles[trunk_id], [trunk_id]))
        else:
            same.append(trunk_id)
    return groups


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _finished(queue: Queue, trunk_id: str) -> bool:
    return all(is_over(RunFolder(Path(queue.runs_dir) / run_id)) for run_id in queue.trunks[trunk_id])


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


@contextmanager
def _outside_any_job() -> Iterator[None]:
    """A launch from inside a job must not hand that job's SLURM_* on; where the cluster is, it must."""
    configuration = os.environ.get("SLURM_CONF")
    with clean_env():
        if configuration is not None:
            os.environ["SLURM_CONF"] = configuration
        yield
