"""A sweep on a real SLURM: submitted once, disturbed in every way that a cluster has, and its results the same."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import RESOURCES, SWEEP
from mini_slurm import MiniSlurm, eventually
from test_mlflow_server import stored, sync

from fluidscale.record import VOLATILE, read_json
from slurm import layout

pytestmark = pytest.mark.cluster
# Of a sweep's life on a machine that others use as well; on a free one it takes a minute.
PATIENCE = 1200.0
TRAINING = re.compile(r"training from step (\d+) of (\d+)")


@dataclass(frozen=True)
class Launch:
    """The launcher's command line on one sweep and one cluster."""

    slurm: MiniSlurm
    sweep: Path
    resources: Path
    runs: Path

    def start(self, command: str, *options: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "slurm.launch", command, str(self.sweep), "--cluster", "slurm", *options]
        words += ["--resources", str(self.resources), "--runs", str(self.runs)]
        words += ["--results", str(self.runs.parent / "results")]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, env=self.slurm.environment, stdout=pipe, stderr=pipe, text=True)

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
        """The trunk of each task that was submitted."""
        found = {}
        for path in layout.submissions(self.runs).glob("*.json"):
            content = read_json(path) or {}
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


@pytest.fixture(scope="module")
def submitted(slurm, sweep, undisturbed):
    """The sweep in the queue, by two launches at once; what they said. Its partition is closed, so that nothing is
    over before a test has looked, however slow the machine.
    """
    slurm.ask("scontrol", "update", "PartitionName=low", "State=DOWN")
    # Under a name of its own: beside the reference's, an experiment of its own.
    (sweep / "disturbed.yaml").write_text(SWEEP)
    launch = Launch(slurm, sweep / "disturbed.yaml", sweep / "resources.yaml", sweep / "runs")
    both = [launch.start("submit") for _ in range(2)]
    return launch, [ended(process) for process in both]


def test_two_launches_at_once_submit_every_trunk_once(submitted):
    launch, said = submitted
    assert sorted("nothing to submit" in words for words in said) == [False, True]
    assert len(launch.trunks()) == len(set(launch.trunks().values())) == 4
    assert "nothing to submit" in launch("submit"), "a third launch trains something again"
    assert len(launch.trunks()) == 4
    states = launch.states()
    assert len(states) == 8 and {row["state"] for row in states.values()} == {"queued"}


def test_a_job_runs_the_code_of_its_submission_whatever_is_edited_meanwhile(submitted):
    launch, _ = submitted
    script = next(layout.worker_logs(launch.runs).glob("*submission*.sh")).read_text()
    first = next(line for line in script.splitlines() if line.startswith("cd "))
    # As submitit starts python: the module is looked for from where the shell stands.
    program = (
        f"{first}; {sys.executable} -c 'import fluidscale.run, slurm.job as j; print(fluidscale.__file__, j.__file__)'"
    )
    found = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len(found) == 2 and all(path.startswith(str(layout.snapshots(launch.runs))) for path in found)


def test_whatever_happens_to_its_jobs_the_sweep_ends_as_the_undisturbed_one(submitted, undisturbed, server):
    launch, _ = submitted
    victims = _longest_runs(launch)
    launch.slurm.ask("scontrol", "update", "PartitionName=low", "State=UP")
    twice, lost, preempted, cancelled = sorted(victims)
    for task, fault in ((twice, _requeue), (preempted, _preempt), (cancelled, _cancel), (lost, _kill_node)):
        eventually((victims[task] / "ckpt" / "last.ckpt").exists, f"a checkpoint of {task}", PATIENCE)
        assert not (victims[task] / "record.json").exists(), "the run was over before its fault"
        fault(launch, task)
    eventually(lambda: _training_starts(victims[twice]) > 1, "the requeued task in training again", PATIENCE)
    _requeue(launch, twice)
    eventually(lambda: cancelled not in launch.queue(), "the cancelled task's end", PATIENCE)
    row = launch.states()[victims[cancelled].name]
    assert row["state"] == "stopped" and "CANCELLED" in row["error"]
    sync(launch.runs, server.uri)
    assert "submitted 1 tasks" in launch("submit"), "only what was cancelled is submitted again"
    eventually(lambda: launch.finished() == 8, "all runs finished", PATIENCE)
    assert {run_id: row["state"] for run_id, row in launch.states().items()} == dict.fromkeys(launch.specs(), "done")
    assert "Requeued job" in _log(launch, preempted), "submitit did not requeue the preempted task"
    for run_dir in victims.values():
        starts = [int(step) for step, _ in TRAINING.findall((run_dir / "log.txt").read_text())]
        assert len(starts) > 1 and starts == sorted(starts) and starts[-1] > starts[0], "it was trained from the start"
    undisturbed.wait()
    launch("collect")
    _assert_equal(launch, undisturbed)
    assert sync(launch.runs, server.uri).returncode == 0
    _assert_one_record(launch, server)


def _longest_runs(launch: Launch) -> dict[str, Path]:
    """The longest run's folder of each task."""
    by_trunk = defaultdict(list)
    for row in launch.states().values():
        by_trunk[row["trunk_id"]].append((row["steps"], launch.runs / row["run_id"]))
    return {task: max(by_trunk[trunk])[1] for task, trunk in launch.trunks().items()}


def _requeue(launch: Launch, task: str) -> None:
    launch.slurm.ask("scontrol", "requeue", task)


def _kill_node(launch: Launch, task: str) -> None:
    node = launch.queue()[task][1]
    launch.slurm.kill_node(node)
    eventually(lambda: launch.queue()[task][0] == "PENDING", f"{task} back in the queue", PATIENCE)
    launch.slurm.start_node(node)


def _preempt(launch: Launch, task: str) -> None:
    node = launch.queue()[task][1]
    launch.slurm.ask("sbatch", "-p", "high", "-w", node, "-o", "/dev/null", "--job-name=urgent", "--wrap", "true")


def _cancel(launch: Launch, task: str) -> None:
    launch.slurm.ask("scancel", task)


def _training_starts(run_dir: Path) -> int:
    return len(TRAINING.findall((run_dir / "log.txt").read_text()))


def _log(launch: Launch, task: str) -> str:
    return (layout.worker_logs(launch.runs) / f"{task}_0_log.out").read_text()


def _assert_equal(launch: Launch, reference: Any) -> None:
    """Weights bit for bit, losses step for step, and the table but for what the clock says."""
    for folder in sorted(path.parent for path in launch.runs.glob("*/record.json")):
        other = reference.runs / folder.name
        weights = [path / "ckpt" / "ema.safetensors" for path in (folder, other)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), f"{folder.name}: other weights"
        assert _losses(folder) == _losses(other), f"{folder.name}: other losses"
    assert _table(launch.runs.parent / "results" / "disturbed" / "runs.csv") == _table(reference.table)


def _losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train_loss"]) for line in lines]


def _table(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        rows = [
            {key: value for key, value in row.items() if key not in (*VOLATILE, "sweep")}
            for row in csv.DictReader(file)
        ]
    assert len(rows) == 8
    return sorted(rows, key=lambda row: row["run_id"])


def _assert_one_record(launch: Launch, server: Any) -> None:
    """Each run is one run of the tracker, whatever it went through."""
    from mlflow.tracking import MlflowClient

    tracked = stored(MlflowClient(server.uri), "disturbed")
    for folder in (path.parent for path in launch.runs.glob("*/record.json")):
        own = read_json(folder / "mlflow.json") or {}
        assert tracked[folder.name].info.run_id == own["run_id"]
        assert tracked[folder.name].info.status == "FINISHED"


def test_a_thousand_runs_are_submitted_watched_and_cancelled_in_seconds(slurm, tmp_path):
    many = SWEEP.replace("seeds: [0]", f"seeds: {list(range(250))}").replace("[480, 2880]", "[480]")
    (tmp_path / "many.yaml").write_text(many)
    (tmp_path / "resources.yaml").write_text(RESOURCES.replace("partition: low", "partition: high"))
    launch = Launch(slurm, tmp_path / "many.yaml", tmp_path / "resources.yaml", tmp_path / "runs")
    slurm.ask("scontrol", "update", "PartitionName=high", "State=DOWN")
    try:
        assert launch.seconds("submit") < 10
        assert len(launch.queue()) == 1000
        assert launch.seconds("status") < 3
        assert "1000 processes and tasks stopped" in launch("cancel")
        assert not launch.queue()
    finally:
        # Before the partition opens: whatever went wrong, a thousand tasks must not start.
        slurm.ask("scancel", "--name=many", check=False)
        slurm.ask("scontrol", "update", "PartitionName=high", "State=UP")
