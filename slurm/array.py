"""SLURM through submitit: a trunk is one task of an array, and submitit alone owns its requeue."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from submitit import AutoExecutor
from submitit.helpers import DelayedSubmission, clean_env

from slurm import layout
from slurm.job import Execute, Queue, StopSignal, execute, load_queue, train_trunk
from slurm.placement import Profile

# Most clusters allow arrays of at most 1001 tasks (slurm.conf, MaxArraySize).
_ARRAY_TASKS = 1000
# In the last ten minutes of a job every preemption looks like a time-out to submitit, which allows three of them.
_TIMEOUTS = 1000


class TrunkTask:
    """Trains one trunk of a queue. When SLURM takes the node away, the same task goes back into the queue.

    It carries no state: the runs resume from their newest checkpoint on disk, also after a death without warning.
    """

    def __init__(self, queue_path: str, trunk_id: str, execute: Execute = execute) -> None:
        self.queue_path, self.trunk_id, self.execute = queue_path, trunk_id, execute
        self.stop: StopSignal | None = None

    def __call__(self) -> None:
        self.stop = StopSignal()
        train_trunk(load_queue(Path(self.queue_path)), self.trunk_id, None, self.execute, self.stop)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit inside its signal handler, just before it requeues and exits."""
        if self.stop is not None:
            self.stop.received = True
        return DelayedSubmission(TrunkTask(self.queue_path, self.trunk_id, self.execute))


def submit(queue: Queue, trunk_ids: Sequence[str], profile: Profile, cluster: str) -> list[str]:
    """Submits a task a trunk and returns the job ids. `cluster` is slurm, or debug: in this process, one by one."""
    executor = AutoExecutor(layout.worker_logs(Path(queue.runs_dir)), cluster=cluster, slurm_max_num_timeout=_TIMEOUTS)
    executor.update_parameters(name=queue.sweep, timeout_min=profile.minutes, **_slurm(profile))
    ids = []
    for first in range(0, len(trunk_ids), _ARRAY_TASKS):
        tasks = [TrunkTask(str(queue.path), trunk_id) for trunk_id in trunk_ids[first : first + _ARRAY_TASKS]]
        with _outside_any_job(), executor.batch():
            jobs = [executor.submit(task) for task in tasks]
        if cluster == "debug":
            for job in jobs:
                job.result()
        ids += [job.job_id for job in jobs]
    return ids


@contextmanager
def _outside_any_job() -> Iterator[None]:
    """A launch from inside a job must not hand that job's SLURM_* on; where the cluster is, it must."""
    configuration = os.environ.get("SLURM_CONF")
    with clean_env():
        if configuration is not None:
            os.environ["SLURM_CONF"] = configuration
        yield


def _slurm(profile: Profile) -> dict[str, Any]:
    named = {f"slurm_{key}": getattr(profile, key) for key in ("partition", "account", "qos", "constraint")}
    return {
        **{key: value for key, value in named.items() if value},
        "slurm_array_parallelism": profile.parallel,
        "cpus_per_task": profile.threads,
        "gpus_per_node": 0 if profile.device == "cpu" else 1,
    }
