"""What runs inside a SLURM job. Tasks carry no state: whatever happens to one, its next life resumes from files.

submitit alone owns the requeue. Its handler would end the process in mid-step, so SLURM's notice is heard here first:
the run stops after its step with a checkpoint, and then the handler puts the task back into the queue.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission
from submitit.slurm.slurm import SlurmJobEnvironment

from fluidscale.folder import RunFolder
from slurm import attempts, layout, scheduler
from slurm.job import WHOLE, Execute, Queue, Stopped, StopSignal, Worker, execute, is_over, load_queue
from slurm.mirror import Mirror, is_remote

# SLURM's notice before a job's time is over: long enough for the step, the checkpoint and the requeue.
NOTICE_SECONDS = 90
# The notice may come this much early (sbatch's manual, --signal).
_EARLY_SECONDS = 60
# Of a notice, what is left for the way out when a step or its checkpoint does not end.
_LEAVING_SECONDS = 20.0
# A requeued task may start before the last process of its former life is dead, and a dead node's locks are freed late.
_HANDOVER_SECONDS = 300.0
# After SIGTERM, SLURM decides what becomes of the job: the end (scancel) or the queue (preemption).
_LAST_WORD_SECONDS = 300.0
# A look at the tracker's mirror: is there one for this run folder?
_MIRROR_SECONDS = 5.0
# What a mirror may take to come level at a task's end; the sweep's last job has all the time it needs.
_MIRROR_PATIENCE = 10.0


class TrunkTask:
    """Works on some trunks of a queue. When SLURM takes the node away, the same task goes back into the queue."""

    def __init__(
        self,
        queue_path: str,
        trunk_ids: Sequence[str],
        restarts: Mapping[str, int],
        stage: str = WHOLE,
        placement: Mapping[str, Any] | None = None,
        notice: int = NOTICE_SECONDS,
        execute: Execute = execute,
    ) -> None:
        self.queue_path, self.trunk_ids, self.restarts = queue_path, tuple(trunk_ids), dict(restarts)
        self.stage, self.placement, self.notice, self.execute = stage, dict(placement or {}), notice, execute

    def __call__(self) -> None:
        queue, stop = load_queue(Path(self.queue_path)), SlurmStop(self.notice)
        worker = Worker(queue, stop, self.execute, None, self.stage, self.restarts, self.placement)
        try:
            with _mirrored(Path(queue.runs_dir), stop):
                for trunk_id in self.trunk_ids:
                    self._work(worker, trunk_id)
        except (Stopped, SystemExit):
            if not stop():
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if stop():
            stop.leave()
        stop.deafen()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit puts back into the queue: the same task."""
        same = (self.restarts, self.stage, self.placement, self.notice, self.execute)
        return DelayedSubmission(TrunkTask(self.queue_path, self.trunk_ids, *same))

    def _work(self, worker: Worker, trunk_id: str) -> None:
        if not _leads():
            worker.follow(trunk_id)
            return
        deadline = time.monotonic() + _HANDOVER_SECONDS
        while not worker.is_stopped() and not worker.train(trunk_id):
            if not attempts.life() or is_finished(worker.queue, trunk_id, self.stage):
                print(f"{trunk_id}: finished, or in another worker's hands", flush=True)
                return
            if time.monotonic() > deadline:
                claim = layout.trunk_claim(Path(worker.queue.runs_dir), trunk_id, self.stage)
                raise RuntimeError(f"{claim}: held by another worker")
            time.sleep(1)


class Conclusion:
    """The sweep's last job: brings the tracker level, collects what is finished, fits and reports.

    `folder` is that of the launch: paths in a sweep's file are relative to it, and a job starts elsewhere.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.arguments, self.folder = tuple(arguments), folder

    def __call__(self) -> None:
        from slurm.launch import conclude

        if code := conclude(self.arguments, self.folder):
            raise SystemExit(code)

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(Conclusion(self.arguments, self.folder))


class SlurmStop(StopSignal):
    """SLURM's signals: a notice (submitit's signal, at the end of time and before preemption) or a bare SIGTERM."""

    def __init__(self, notice: int) -> None:
        """`notice`: the seconds that SLURM leaves from its notice to the end."""
        super().__init__()
        self._after_notice = max(notice - _LEAVING_SECONDS, self.patience)
        number = getattr(signal, f"SIG{SlurmJobEnvironment.USR_SIG}")
        self._number, self._requeue, self._noticed = number, signal.getsignal(number), False
        self._cause = ""
        if callable(self._requeue):
            signal.signal(number, self._notice)

    def _notice(self, *_: Any) -> None:
        self._noticed = True
        # There is time for a long step and its checkpoint.
        self.patience = self._after_notice
        signal.raise_signal(signal.SIGTERM)

    def cause(self) -> str:
        """What SLURM says of this job at the first asking: preemption | time_limit | requeue, else stopped."""
        if not self._cause:
            self._cause = cause_of(scheduler.job_facts(attempts.job_id()), attempts.life(), self._noticed)
        return self._cause

    def deafen(self) -> None:
        """All is done: a notice that comes while Python takes itself apart must not make a failure of it."""
        if callable(self._requeue):
            signal.signal(self._number, signal.SIG_IGN)

    def leave(self) -> None:
        """Ends this process, requeued where SLURM gave notice; on a bare SIGTERM SLURM itself has the last word."""
        deadline = time.monotonic() + _LAST_WORD_SECONDS
        while callable(self._requeue) and time.monotonic() < deadline:
            if self._noticed:
                # A controller that does not answer now may do so in a moment.
                with suppress(subprocess.SubprocessError):
                    self._requeue(self._number, None)
            time.sleep(0.2)
        sys.exit(128 + signal.SIGTERM)


def cause_of(facts: Mapping[str, str], restarts: int, noticed: bool) -> str:
    """Why SLURM ends a job, from what `scontrol show job` says of it at that moment (empty: it did not answer)."""
    if facts.get("PreemptTime", "None") not in ("None", ""):
        return "preemption"
    if int(facts.get("Restarts", restarts)) > restarts:
        return "requeue"
    left = _seconds_until(facts.get("EndTime", ""))
    if facts.get("JobState") == "TIMEOUT" or (noticed and left < NOTICE_SECONDS + _EARLY_SECONDS):
        return "time_limit"
    return "requeue" if noticed else "stopped"


def _seconds_until(stamp: str) -> float:
    """Of SLURM's local time; a stamp that is none lies in the far future."""
    try:
        return datetime.fromisoformat(stamp).timestamp() - time.time()
    except ValueError:
        return float("inf")


def is_finished(queue: Queue, trunk_id: str, stage: str = WHOLE) -> bool:
    """Whether nothing of a stage is left to do for a trunk."""
    return all(is_over(RunFolder(Path(queue.runs_dir) / run_id), stage) for run_id in queue.trunks[trunk_id])


def _leads() -> bool:
    """Whether this is the first of the processes that compute a run together: it alone claims, and writes files."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


@contextmanager
def _mirrored(runs_dir: Path, stop: StopSignal) -> Iterator[None]:
    """While a task works, one process of the sweep's tasks mirrors the run folder to a tracking server.

    A database beside the runs is left to the last job: several nodes must not share one.
    """
    if not (_leads() and is_remote(os.environ.get("MLFLOW_TRACKING_URI"))):
        yield
        return
    over = threading.Event()
    with Mirror(runs_dir) as mirror:
        mirror.patience = _MIRROR_PATIENCE

        def watch() -> None:
            while True:
                mirror.keep_alive()
                if over.wait(_MIRROR_SECONDS):
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            if stop():
                mirror.patience = 0.0
