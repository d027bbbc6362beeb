"""Everything that a cluster does to jobs, done to a sweep while it trains; what was seen on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mini_slurm import MiniSlurm, eventually
from mlflow.tracking import MlflowClient
from test_mlflow_server import stored, sync

from fluidscale.record import read_json
from fluidscale.train.checkpoint import NEWEST, PREVIOUS, newest_loadable
from slurm import layout

# Of a sweep's life on a machine that others use as well; on a free one it takes two minutes.
PATIENCE = 1200.0
TRAINING = re.compile(r"training from step (\d+) of (\d+)")
# What a server must be able to be gone for without anybody noticing.
OUTAGE_SECONDS = 60.0
_PLACES = 8
# Kept for good: a service that a thread has started dies with it (prctl's PDEATHSIG is of the thread).
_HANDS = ThreadPoolExecutor(4)


@dataclass(frozen=True)
class Launch:
    """The launcher's command line on one sweep and one cluster."""

    slurm: MiniSlurm
    sweep: Path
    resources: Path
    runs: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, command: str, *options: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "slurm.launch", command, str(self.sweep), "--cluster", "slurm", *options]
        words += ["--resources", str(self.resources), "--runs", str(self.runs)]
        words += ["--results", str(self.runs.parent / "results")]
        pipe = subprocess.PIPE
        environment = {**self.slurm.environment, **self.environment}
        return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, command: str, *options: str) -> str:
        return ended(self.start(command, *options))

    def seconds(self, command: str) -> float:
        """Processor time that a command takes, its children's included: on a loaded machine the clock says little."""
        before = os.times()
        self(command)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    def states(self) -> dict[str, dict[str, Any]]:
        return {row["run_id"]: row for row in json.loads(self("status", "--json"))["runs"]}

    def queue(self) -> dict[str, tuple[str, str]]:
        """Of this sweep's tasks in the queue: SLURM's word for the state, and the node."""
        name = self.sweep.stem
        lines = self.slurm.ask("squeue", "-h", "-r", f"--name={name}", "-o", "%i|%T|%N").splitlines()
        return {task: (state, node) for task, state, node in (line.split("|") for line in lines)}

    def trunks(self) -> dict[str, str]:
        """The trunk of each task that was submitted for training."""
        found = {}
        for path in layout.submissions(self.runs).glob("*.json"):
            content = read_json(path) or {}
            if content["stage"] not in ("whole", "train"):
                continue
            for index, trunks in enumerate(content["tasks"]):
                found[f"{content['job']}_{index}" if len(content["tasks"]) > 1 else content["job"]] = trunks[0]
        return found

    def specs(self) -> list[str]:
        return [path.parent.name for path in self.runs.glob("*/spec.json")]

    def finished(self) -> int:
        return len(list(self.runs.glob("*/record.json")))


def ended(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output + errors
    return output


def training_starts(run_dir: Path) -> list[int]:
    """The steps from which a run was trained, as its log tells."""
    log = run_dir / "log.txt"
    return [int(step) for step, _ in TRAINING.findall(log.read_text())] if log.exists() else []


@dataclass
class Disturbance:
    """A sweep of four tasks of three runs, and a hand that gives each of them what it must stand."""

    launch: Launch
    server: Any
    victims: dict[str, Path] = field(default_factory=dict)  # the longest run of each task
    killed_at: dict[str, int] = field(default_factory=dict)  # newest checkpoint of a task whose node was killed
    outcomes: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    closed_by_the_tracker: str = ""
    # A place for each question to SLURM; its services are stopped by who has all of them.
    _places: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_PLACES))

    def run(self) -> Disturbance:
        """From the opening of the partition to the last job's end. Every task has a hand of its own, that waits only
        for its task; while SLURM's services are stopped all of them wait.
        """
        self.victims = self._longest_runs()
        twice, lost, preempted, limited = sorted(self.victims)
        self.server.send(signal.SIGSTOP)
        self._ask("scontrol", "update", "PartitionName=low", "State=UP")
        hands = [(self._first_hand, twice), (self._second_hand, lost), (self._third_hand, preempted)]
        done = [_HANDS.submit(hand, task) for hand, task in [*hands, (self._fourth_hand, limited)]]
        for each in as_completed(done):
            each.result()
        eventually(lambda: self.launch.finished() == 12, "all runs finished", PATIENCE)
        eventually(self._is_empty, "the last job's end", PATIENCE)
        return self

    def _first_hand(self, task: str) -> None:
        self._preempt_before_the_first_checkpoint(task)
        self._checkpointed(task)
        self._requeue_twice(task)

    def _second_hand(self, task: str) -> None:
        self._checkpointed(task)
        self._kill_node(task)
        self._services()

    def _third_hand(self, task: str) -> None:
        self._checkpointed(task)
        self._preempt(task)
        self.server.send(signal.SIGCONT)
        self._cancel(task)
        self._tracker_outage()

    def _fourth_hand(self, task: str) -> None:
        self._checkpointed(task)
        self._time_limit(task)
        self._notice_twice(task)

    def _ask(self, *command: str, check: bool = True) -> str:
        with self._places:
            return self.launch.slurm.ask(*command, check=check)

    def _is_empty(self) -> bool:
        # A client's connection may break on a busy machine; then it is asked again.
        with contextlib.suppress(RuntimeError):
            return not self._ask("squeue", "-h")
        return False

    def _queue(self) -> dict[str, tuple[str, str]]:
        with self._places:
            return self.launch.queue()

    def _longest_runs(self) -> dict[str, Path]:
        by_trunk = defaultdict(list)
        for row in self.launch.states().values():
            by_trunk[row["trunk_id"]].append((row["steps"], self.launch.runs / row["run_id"]))
        return {task: max(by_trunk[trunk])[1] for task, trunk in self.launch.trunks().items()}

    def _checkpointed(self, task: str, starts: int = 1) -> None:
        """Waits until a task's longest run has been started so often, and has a checkpoint to lose."""
        run_dir = self.victims[task]
        eventually(lambda: len(training_starts(run_dir)) >= starts, f"{task} in training", PATIENCE)
        eventually((run_dir / "ckpt" / "last.ckpt").exists, f"a checkpoint of {task}", PATIENCE)
        assert not (run_dir / "ckpt" / "ema.safetensors").exists(), f"{task} was trained before its fault"

    def _state(self, task: str) -> str:
        return self._queue().get(task, ("gone", ""))[0]

    def _runs(self, task: str) -> None:
        eventually(lambda: self._state(task) == "RUNNING", f"{task} running", PATIENCE)

    def _preempt_before_the_first_checkpoint(self, task: str) -> None:
        self._runs(task)
        self._preempt(task)
        self.outcomes["preempted before the first checkpoint"] = (
            "a notice before Python can hear it is ignored; SLURM requeues the task when its grace is over",
            "those of the run since its start",
            "the run, from step 0, in its next life",
        )

    def _preempt(self, task: str) -> None:
        node = self._queue()[task][1]
        words = ("-o", "/dev/null", "--job-name=urgent", "--wrap", "true")
        self._ask("sbatch", "-p", "high", "-w", node, *words)
        self.outcomes["preempted by a higher partition"] = (
            "the run stops after its step with a checkpoint, submitit requeues the task",
            "0",
            "an attempt that ended by preemption; the run goes on from that step",
        )

    def _time_limit(self, task: str) -> None:
        # Two minutes from now: SLURM gives its notice at its next look at the clock, half a minute away at most.
        self._ask("scontrol", "update", f"JobId={task}", f"TimeLimit={self._minutes(task) + 2}")
        # SIGNALING is the giving of the notice: the run has yet to ask how much time it has left.
        eventually(lambda: self._state(task) not in ("RUNNING", "SIGNALING"), f"{task} at its limit", PATIENCE)
        self._ask("scontrol", "update", f"JobId={task}", "TimeLimit=30")
        self.outcomes["time limit"] = (
            "the run stops with a checkpoint at SLURM's notice, submitit requeues the task",
            "0",
            "an attempt that ended by time_limit; the run goes on from that step",
        )

    def _minutes(self, task: str) -> int:
        """Full minutes that a task has run."""
        *_, minutes, _ = f"0:{self._ask('squeue', '-h', '-j', task, '-o', '%M')}".split(":")
        return int(minutes)

    def _kill_node(self, task: str) -> None:
        node = self._queue()[task][1]
        self.launch.slurm.kill_node(node)
        checkpoints = self.victims[task] / "ckpt"
        found = newest_loadable([checkpoints / NEWEST, checkpoints / PREVIOUS], 10**9)
        assert found is not None, "killed while it wrote a checkpoint, and none of the two loads"
        self.killed_at[task] = found[1]
        # Another node may have it before anybody has seen it wait.
        eventually(lambda: self._queue().get(task, ("gone", ""))[1] != node, f"{task} off its node", PATIENCE)
        self.launch.slurm.start_node(node)
        self.outcomes["a node killed with all its processes"] = (
            "SLURM misses the node and requeues the task; the next start closes the attempt nobody closed",
            "those since the last checkpoint",
            "an attempt that ended by node_failure at the last heartbeat; the run goes on from its newest checkpoint",
        )

    def _tracker_outage(self) -> None:
        """It hung while the sweep began; now it dies, and is gone for a minute."""
        self.server.kill()
        time.sleep(OUTAGE_SECONDS)
        self.server.start()
        level = "nothing: the sweep's last job, or any sync, brings it level"
        self.outcomes["MLflow hangs (SIGSTOP)"] = ("only the mirror's process waits for it", "0", level)
        said = "the mirror says so and tries again; no run notices"
        self.outcomes[f"MLflow gone for {OUTAGE_SECONDS:.0f} s"] = (said, "0", level)

    @contextlib.contextmanager
    def _without_accounting(self) -> Iterator[None]:
        with contextlib.ExitStack() as everybody_waits:
            for _ in range(_PLACES):
                everybody_waits.enter_context(self._places)
            self.launch.slurm.stop_accounting_daemon()
            try:
                yield
            finally:
                self.launch.slurm.start_accounting_daemon()

    def _services(self) -> None:
        """Accounting goes, the controller restarts meanwhile; status must work without sacct."""
        with self._without_accounting():
            self.launch.slurm.stop_controller()
            self.launch.slurm.start_controller()
            rows = self.launch.states()
        # Without sacct nobody knows the end of what a controller had forgotten when it was restarted.
        known = {"queued", "running", "trained", "stopped", "lost", "done"}
        assert len(rows) == 12 and {row["state"] for row in rows.values()} <= known, rows
        self.outcomes["slurmctld restarted"] = ("jobs run on; the controller finds them again", "0", "nothing")
        self.outcomes["slurmdbd stopped"] = ("status and submission do without sacct", "0", "nothing")

    def _requeue_twice(self, task: str) -> None:
        for _ in range(2):
            self._runs(task)
            self._ask("scontrol", "requeue", task)
            eventually(lambda: self._state(task) != "RUNNING", f"{task} requeued", PATIENCE)
        self.outcomes["scontrol requeue, twice in quick succession"] = (
            "SIGTERM: the run stops with a checkpoint; the second comes while its next life starts",
            "0",
            "attempts that ended by requeue; the run goes on from that step",
        )

    def _notice_twice(self, task: str) -> None:
        self._checkpointed(task, starts=2)
        for _ in range(2):
            self._ask("scancel", "-s", "USR2", task, check=False)
        eventually(lambda: self._state(task) != "RUNNING", f"{task} requeued", PATIENCE)
        self.outcomes["USR2 in mid-step, and twice"] = (
            "the step is finished, the run stops with a checkpoint, submitit requeues the task",
            "0",
            "an attempt that ended by requeue; the run goes on from that step",
        )

    def _cancel(self, task: str) -> None:
        """Somebody cancels a task; the same command submits only what was cancelled, and the tracker hears of it."""
        run_dir = self.victims[task]
        self._checkpointed(task, starts=2)
        # Accounting that is down is accounting that is late: it must not be what says how a task has just ended.
        with self._without_accounting():
            self.launch.slurm.ask("scancel", task)
            eventually(lambda: task not in self.launch.queue(), f"{task} gone", PATIENCE)
            row = self.launch.states()[run_dir.name]
        assert row["state"] == "stopped" and f"job {task}: CANCELLED" in row["error"], row
        with self._places:
            sync(self.launch.runs, self.server.uri)
            tracked = stored(MlflowClient(self.server.uri), "disturbed")
            self.closed_by_the_tracker = tracked[run_dir.name].info.status
            said = self.launch("submit")
            assert "submitted 2 tasks" in said, f"only what was cancelled is trained and evaluated again: {said}"
        self.outcomes["scancel by an impatient user"] = (
            "the run stops with a checkpoint; status says CANCELLED; the same command submits only what is missing",
            "0",
            "a run shown as stopped, closed in MLflow until it goes on",
        )
