"""A sweep on a real SLURM: submitted once, disturbed in every way that a cluster has, and its results the same."""

from __future__ import annotations

import csv
import getpass
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import RESOURCES, SWEEP
from disturbance import TRAINING, Disturbance, Launch, ended, training_starts
from mini_slurm import eventually
from test_mlflow_server import history, stored

from fluidscale.folder import RunFolder
from fluidscale.record import VOLATILE, read_json
from slurm import attempts, layout

pytestmark = pytest.mark.cluster
# What a user's environment may hold, and no file of ours.
PLANTED = {"MLFLOW_TRACKING_PASSWORD": "hunter2-planted", "MLFLOW_TRACKING_USERNAME": "planted-somebody"}


@pytest.fixture(scope="module")
def submitted(slurm, sweep, undisturbed, server):
    """The sweep in the queue, by two launches at once, one of them from inside a job; what they said. Its partition is
    closed, so that nothing is over before a test has looked, however slow the machine.
    """
    slurm.ask("scontrol", "update", "PartitionName=low", "State=DOWN")
    # Under a name of its own: beside the reference's, an experiment of its own.
    (sweep / "disturbed.yaml").write_text(SWEEP)
    tracker = {"MLFLOW_TRACKING_URI": server.uri, **PLANTED}
    launch = Launch(slurm, sweep / "disturbed.yaml", sweep / "resources.yaml", sweep / "runs", tracker)
    inside = replace(launch, environment={**tracker, "SLURM_NTASKS": "5", "SBATCH_TIMELIMIT": "1", "SLURM_JOB_ID": "1"})
    both = [each.start("submit") for each in (launch, inside)]
    yield launch, [ended(process) for process in both]
    slurm.ask("scancel", "-u", getpass.getuser(), check=False)


def test_two_launches_at_once_submit_every_trunk_once(submitted, fault):
    launch, said = submitted
    assert sorted("nothing to submit" in words for words in said) == [False, True]
    assert len(launch.trunks()) == len(set(launch.trunks().values())) == 4
    assert "nothing to submit" in launch("submit"), "a third launch trains something again"
    assert len(launch.trunks()) == 4
    names = launch.slurm.ask("squeue", "-h", "-r", "-o", "%j").splitlines()
    assert sorted(names) == [*4 * ["disturbed"], "disturbed-conclude", *4 * ["disturbed-evaluate"]]
    states = launch.states()
    assert len(states) == 12 and {row["state"] for row in states.values()} == {"queued"}
    fault(
        "the same sweep launched twice at once, once from inside a job",
        then="a lock: the second finds everything in the queue already",
        repeated="0",
        leaves="each trunk in the queue once, in jobs that inherit nothing of the job they were launched from",
    )


def test_a_dry_run_says_what_sbatch_was_given(submitted, tmp_path):
    launch, _ = submitted
    scripts = [path.read_text() for path in layout.worker_logs(launch.runs).glob("*submission*.sh")]
    said = replace(launch, runs=tmp_path / "runs")("submit", "--dry-run")
    arrays = said.split("\n\n")[1:-1]
    assert len(arrays) == 2 and not (tmp_path / "runs").exists()
    for text in arrays:
        lines = {line for line in text.splitlines() if line.startswith("#SBATCH") and "dependency" not in line}
        assert len(lines) >= 5
        names = ("#SBATCH --job-name=disturbed", "#SBATCH --job-name=disturbed-evaluate")
        lines -= set(names)
        assert any(lines <= set(script.splitlines()) for script in scripts), f"no script has {lines}"


def test_a_job_runs_the_code_of_its_submission_whatever_is_edited_meanwhile(submitted, fault):
    launch, _ = submitted
    script = next(layout.worker_logs(launch.runs).glob("*submission*.sh")).read_text()
    first = next(line for line in script.splitlines() if line.startswith("cd "))
    # As submitit starts python: the module is looked for from where the shell stands.
    program = (
        f"{first}; {sys.executable} -c 'import fluidscale.run, slurm.job as j; print(fluidscale.__file__, j.__file__)'"
    )
    found = subprocess.run(["sh", "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len(found) == 2 and all(path.startswith(str(layout.snapshots(launch.runs))) for path in found)
    fault(
        "the code edited while jobs wait or are requeued",
        then="jobs run the snapshot of their submission; a changed spec.json is refused",
        repeated="0",
        leaves="the snapshot, once per content, in runs/.launch/code",
    )


@pytest.fixture(scope="module")
def disturbed(submitted, undisturbed, server):
    """The sweep after everything that a cluster does to its jobs: what was seen on the way."""
    return Disturbance(*submitted[:1], server).run()


def test_whatever_happens_to_its_jobs_the_sweep_ends_as_the_undisturbed_one(disturbed, undisturbed):
    launch = disturbed.launch
    undisturbed.wait()
    for folder in sorted(path.parent for path in launch.runs.glob("*/record.json")):
        other = undisturbed.runs / folder.name
        weights = [path / "ckpt" / "ema.safetensors" for path in (folder, other)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), f"{folder.name}: other weights"
        assert _losses(folder) == _losses(other), f"{folder.name}: other losses"
    assert _table(launch.runs.parent / "results" / "disturbed" / "runs.csv") == _table(undisturbed.table)


def test_no_step_is_lost_beyond_the_last_checkpoint_and_every_cause_is_counted(disturbed, fault):
    counts = Counter()
    for run_dir in (path.parent for path in disturbed.launch.runs.glob("*/record.json")):
        lives = attempts.read(RunFolder(run_dir))
        counts.update(attempts.retries(lives))
        log = (run_dir / "log.txt").read_text()
        starts = [int(step) for step, _ in TRAINING.findall(log)]
        assert starts == sorted(starts), "it went back"
        events = re.findall(r"(training from|stopped at) step (\d+)", log)
        for (what, step), (then, again) in itertools.pairwise(events):
            if what == "stopped at":
                assert (then, again) == ("training from", step), f"{run_dir.name}: steps lost after a clean stop"
        assert lives[-1].end == "done"
    for task, step in disturbed.killed_at.items():
        assert step in training_starts(disturbed.victims[task]), "it did not go on from its newest checkpoint"
    # Of two preemptions and three requeues one each may come before the task's Python runs and leave no trace.
    assert counts["preemption"] >= 1 and counts["time_limit"] >= 1 and counts["node_failure"] >= 1, counts
    assert counts["requeue"] >= 2, counts
    for name, (then, repeated, leaves) in disturbed.outcomes.items():
        fault(name, then=then, repeated=repeated, leaves=leaves)


def test_each_run_is_one_run_of_the_tracker_and_closed(disturbed, server):
    from mlflow.tracking import MlflowClient

    assert disturbed.closed_by_the_tracker == "KILLED", "a run whose job was cancelled stayed open"
    client = MlflowClient(server.uri)
    tracked = stored(client, "disturbed")
    folders = [path.parent for path in disturbed.launch.runs.glob("*/record.json")]
    assert sorted(tracked) == sorted(folder.name for folder in folders)
    for folder in folders:
        run = tracked[folder.name]
        assert run.info.run_id == (read_json(folder / "mlflow.json") or {})["run_id"] and run.info.status == "FINISHED"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert history(client, run.info.run_id, "train_loss") == {line["step"]: line["train_loss"] for line in lines}


def test_nothing_of_it_is_secret_or_others_to_write(disturbed):
    for folder in (disturbed.launch.runs, disturbed.launch.runs.parent / "results"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 10
        assert not [path for path in files if b"planted" in path.read_bytes()], "a secret was written"
        assert not [path for path in files if path.stat().st_mode & 0o022], "others may write it"


def _losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train_loss"]) for line in lines]


def _table(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        rows = [
            {key: value for key, value in row.items() if key not in (*VOLATILE, "sweep")}
            for row in csv.DictReader(file)
        ]
    assert len(rows) == 12
    return sorted(rows, key=lambda row: row["run_id"])


@pytest.fixture
def waiting(slurm, tmp_path):
    """A small sweep on a partition that is closed: what is submitted waits, and is cancelled at the end."""
    (tmp_path / "few.yaml").write_text(SWEEP.replace("[480, 960, 19200]", "[480]"))
    (tmp_path / "resources.yaml").write_text(RESOURCES.replace("partition: low", "partition: high"))
    slurm.ask("scontrol", "update", "PartitionName=high", "State=DOWN")
    yield Launch(slurm, tmp_path / "few.yaml", tmp_path / "resources.yaml", tmp_path / "runs")
    slurm.ask("scancel", "--name=few,few-evaluate,few-conclude", check=False)
    slurm.ask("scontrol", "update", "PartitionName=high", "State=UP")


def test_what_is_cancelled_before_it_starts_is_known_at_once(waiting):
    waiting("submit")
    task, *others = sorted(waiting.trunks())
    waiting.slurm.ask("scancel", task)
    # Its evaluation may be in the queue still, and makes nothing of it.
    rows = waiting.states().values()
    stopped = [row for row in rows if row["state"] == "stopped"]
    assert [row["trunk_id"] for row in stopped] == [waiting.trunks()[task]] and len(others) == 3, rows
    assert f"job {task}: CANCELLED" in stopped[0]["error"]
    assert {row["state"] for row in rows if row not in stopped} == {"queued"}
    assert all("waits: PartitionDown" in row["error"] for row in rows if row not in stopped), rows
    assert "submitted 2 tasks" in waiting("submit"), "its training and its evaluation"
    waiting("cancel")
    assert {row["state"] for row in waiting.states().values()} == {"stopped"}


def test_after_scancel_the_same_command_at_once_submits_what_was_cancelled(waiting):
    waiting.sweep.write_text(
        SWEEP.replace("[480, 960, 19200]", "[19200]").replace("arms: all", "arms: [discrete-raster]")
    )
    waiting.slurm.ask("scontrol", "update", "PartitionName=high", "State=UP")
    waiting("submit")
    (run_id,) = waiting.states()
    eventually(lambda: training_starts(waiting.runs / run_id), "the run is being trained")
    waiting.slurm.ask("scancel", *waiting.trunks())
    # It ends after its step, with a checkpoint: until then SLURM has it in the queue.
    said = waiting("submit")
    assert "submitted 2 tasks" in said, said
    assert waiting.states()[run_id]["state"] in ("queued", "running")
    waiting("cancel")


def test_a_launch_of_another_size_leaves_the_last_job_of_the_first_alone(waiting):
    def last_jobs() -> list[str]:
        return waiting.slurm.ask("squeue", "-h", "--name=few-conclude", "-o", "%i").split()

    waiting.sweep.write_text(waiting.sweep.read_text().replace("sizes: [50K]", "sizes: [50K, 80K]"))
    waiting("submit", "--size", "50K")
    (first,) = last_jobs()
    waiting("submit", "--size", "80K")
    assert len(last_jobs()) == 2 and first in last_jobs()


def test_what_sbatch_refuses_is_one_line_and_the_corrected_command_does_not_wait(waiting):
    right = waiting.resources.read_text()
    waiting.resources.write_text(right.replace("partition: high", "partition: nowhere"))
    process = waiting.start("submit")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and len(said.strip().splitlines()) == 1 and "invalid partition" in said, said
    # Nothing is announced that a later launch would wait for.
    assert not list(layout.submissions(waiting.runs).glob("*.json"))
    waiting.resources.write_text(right)
    assert "submitted 8 tasks" in waiting("submit")


def test_a_thousand_runs_are_submitted_watched_and_cancelled_in_seconds(slurm, tmp_path, fault):
    many = SWEEP.replace("seeds: [0]", f"seeds: {list(range(250))}").replace("[480, 960, 19200]", "[480]")
    (tmp_path / "many.yaml").write_text(many)
    resources = RESOURCES.replace("partition: low", "partition: high").replace(", evaluation: {minutes: 20}", "")
    (tmp_path / "resources.yaml").write_text(resources)
    launch = Launch(slurm, tmp_path / "many.yaml", tmp_path / "resources.yaml", tmp_path / "runs")
    slurm.ask("scontrol", "update", "PartitionName=high", "State=DOWN")
    try:
        draw, kills = random.Random(4), 4
        for _ in range(kills):
            process = launch.start("submit")
            # Of its start, the writing of a thousand folders, the sbatch call, or the wait for its answer.
            eventually(lambda: list(launch.runs.glob("*/spec.json")), "the first run's folder")
            time.sleep(2 * draw.random())
            process.kill()
            process.communicate()
        assert launch.seconds("submit") < 10
        assert len(launch.queue()) == 1000, "a task was submitted twice, or lost"
        waiting = slurm.ask("squeue", "-h", "-r", "--name=many", "-o", "%i").split()
        lacking = [job for job in waiting if not (layout.worker_logs(launch.runs) / f"{job}_submitted.pkl").exists()]
        assert not lacking, "a task would find nothing to do"
        assert launch.seconds("status") < 3
        assert "1001 processes and tasks stopped" in launch("cancel")
        assert not launch.queue()
    finally:
        # Before the partition opens: whatever went wrong, a thousand tasks must not start.
        slurm.ask("scancel", "--name=many", check=False)
        slurm.ask("scancel", "--name=many-conclude", check=False)
        slurm.ask("scontrol", "update", "PartitionName=high", "State=UP")
    fault(
        "the launcher killed while it submits (kill -9)",
        then="the same command goes on; an sbatch call that outlived its launcher is waited for, and adopted if its "
        "tasks can begin, else cancelled and made again",
        repeated="0",
        leaves=f"after {kills} kills, each of 1000 tasks in the queue once",
    )
