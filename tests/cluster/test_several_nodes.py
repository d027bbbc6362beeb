"""Runs of several nodes and processes through srun: requeued in the middle, and gone on with in another placement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SWEEP
from disturbance import Launch, training_starts
from mini_slurm import eventually

from fluidscale.folder import RunFolder
from fluidscale.train.checkpoint import NEWEST
from slurm import attempts

pytestmark = pytest.mark.cluster
SIZES = {"50K": "ddp", "80K": "fsdp"}
STEPS, BATCH = 30, 64


def resources(nodes: int, devices: int, micro_batch: int) -> str:
    """A profile in which a size is trained by DDP and the other by FSDP; a checkpoint every few steps."""
    sizes = ", ".join(f"{size}: {{strategy: {strategy}}}" for size, strategy in SIZES.items())
    return f"""
slurm: {{device: cpu, threads: 1, precision: 32-true, partition: wide, minutes: 30, memory_gb: 4,
        checkpoint_minutes: 0.002, nodes: {nodes}, devices: {devices}, micro_batch: {micro_batch}, strategy: ddp,
        sizes: {{{sizes}}}}}
"""


@pytest.fixture
def launch(slurm, tmp_path):
    sweep = SWEEP.replace("[50K]", f"[{', '.join(SIZES)}]").replace("arms: all", "arms: [continuous-random]")
    sweep = sweep.replace("[480, 960, 19200]", f"[{STEPS * BATCH}]").replace("batch: 8", f"batch: {BATCH}")
    sweep = sweep.replace("images_unique: 64", f"images_unique: {BATCH}")
    (tmp_path / "wide.yaml").write_text(sweep)
    yield Launch(slurm, tmp_path / "wide.yaml", tmp_path / "resources.yaml", tmp_path / "runs")
    names = "--name=wide,wide-conclude"
    slurm.ask("scancel", names, check=False)
    # Others look at the whole queue, in which a cancelled job stays until its node has let go of it.
    eventually(lambda: not slurm.ask("squeue", "-h", names), "nothing left in the queue")


def straight(launch: Launch) -> Path:
    """The same runs, each in one process of this machine that nothing disturbs."""
    folder = launch.runs.parent / "straight"
    command = [sys.executable, "-m", "slurm.launch", "submit", str(launch.sweep), "--cluster", "debug"]
    command += ["--profile", "cpu", "--runs", str(folder), "--results", str(folder.parent / "straight-results")]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert len(list(folder.glob("*/record.json"))) == len(SIZES), answer.stdout + answer.stderr
    return folder


def started_again(run_dir: Path, starts: int) -> bool:
    """Whether a run was started so often, and has written a checkpoint since."""
    if len(training_starts(run_dir)) < starts or not (newest := run_dir / "ckpt" / NEWEST).exists():
        return False
    return newest.stat().st_mtime > (run_dir / "log.txt").stat().st_mtime


def in_training(run_dirs: dict[str, Path], starts: int, happens: Callable[[str], object]) -> None:
    """To each task as soon as its run has been started so often and has a checkpoint to go on from."""
    left = dict(run_dirs)

    def one_more() -> bool:
        for task, run_dir in list(left.items()):
            folder = RunFolder(run_dir)
            state = folder.status.get("state")
            assert state != "failed" and not folder.weights.exists(), f"{task}, before its fault: {folder.status}"
            if started_again(run_dir, starts):
                del left[task]
                happens(task)
        return not left

    eventually(one_more, f"all in training number {starts}")


def requeued_with_a_late_word(launch: Launch, task: str, run_dir: Path) -> None:
    """SLURM's word reaches the nodes one after the other; here, the last process some steps before the first."""
    for pid in launch.slurm.processes(SLURM_JOB_ID=task, SLURM_PROCID="3"):
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: RunFolder(run_dir).status.get("state") == "stopped", f"{task} stopped by its last process")
    launch.slurm.ask("scontrol", "requeue", task)


def test_four_processes_on_two_nodes_are_requeued_and_go_on_as_two_on_one(launch, fault):
    launch.resources.write_text(resources(nodes=2, devices=2, micro_batch=8))
    launch("submit")
    trunks = {row["trunk_id"]: launch.runs / row["run_id"] for row in launch.states().values()}
    run_dirs = {task: trunks[trunk_id] for task, trunk_id in launch.trunks().items()}
    in_training(run_dirs, 1, lambda task: requeued_with_a_late_word(launch, task, run_dirs[task]))
    in_training(run_dirs, 2, lambda task: launch.slurm.ask("scancel", task))
    eventually(lambda: not launch.queue(), "all cancelled")
    assert {row["state"] for row in launch.states().values()} == {"stopped"}
    launch.resources.write_text(resources(nodes=1, devices=2, micro_batch=4))
    launch("submit")
    reference = straight(launch)
    eventually(lambda: launch.finished() == len(SIZES) and not launch.queue(), "both finished")
    for run_dir in run_dirs.values():
        lives, starts = attempts.read(RunFolder(run_dir)), training_starts(run_dir)
        assert [life.devices for life in lives] == [4, 4, 2] and [life.end for life in lives][1:] == ["stopped", "done"]
        # On a loaded machine four processes may not come to the end of their step before SLURM kills them (KillWait).
        assert lives[0].end in ("requeue", "node_failure")
        assert 0 == starts[0] < starts[1] < starts[2] < STEPS
        record = RunFolder(run_dir).record or {}
        assert record["status"] == "done"
        losses, expected = (_losses(folder / run_dir.name) for folder in (launch.runs, reference))
        assert losses.keys() == expected.keys() and len(losses) > 1
        # Every global batch was the same, whoever computed which part of it: sums differ by rounding.
        assert losses == pytest.approx(expected, rel=1e-4)
        # Not the weights: the keys' biases have no gradient but rounding, which Adam makes as large as any other.
        assert record["val_loss"] == pytest.approx(
            (RunFolder(reference / run_dir.name).record or {})["val_loss"], rel=1e-3
        )
    fault(
        "two nodes, two processes each (DDP and FSDP through srun), requeued, then cancelled and continued as one node",
        then="whichever hears it first, all processes stop after the same step; the next start goes on, wherever it is",
        repeated="0; those since the last checkpoint where SLURM kills the processes before their step ends",
        leaves="attempts of 4, 4 and 2 devices; losses of one undisturbed process, to rounding",
    )


def _losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train_loss"] for line in lines}
