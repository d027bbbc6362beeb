"""What a run's files stand: kill -9 while they are written, and a disk that is full."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import lacking

from fluidscale.folder import RunFolder
from fluidscale.record import Placement, write_json
from fluidscale.run import run
from fluidscale.sweep import load_sweep
from slurm import local
from slurm.job import StopSignal, Worker
from slurm.placement import Machine, load_profile
from slurm.plan import make_plan

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("tmpdir", [None, "/dev/shm"])
def test_a_run_killed_at_any_moment_goes_on_from_a_whole_file(tmpdir, fault):
    words = [sys.executable, str(ROOT / "benchmarks" / "kill_nine.py"), "--kills", "5"]
    words += ["--tmpdir", tmpdir or os.environ.get("TMPDIR", "/tmp")]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["kills"] == 5
    fault(
        f"kill -9 at a random moment of a run that writes a checkpoint a step, TMPDIR {tmpdir or 'as it is'}",
        then="the next start removes the half-written file and goes on from the newest whole one",
        repeated="those since the last checkpoint",
        leaves="nothing: weights, losses and record are the undisturbed run's",
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    before = [] if os.geteuid() == 0 else ["sudo", "-n"]
    mount = [*before, "mount", "-t", "tmpfs", "-o", "size=24m,mode=0777", "tmpfs", str(place)]
    if shutil.which(mount[0]) is None or subprocess.run(mount, capture_output=True).returncode:
        lacking("right to mount a small file system")
    yield place
    subprocess.run([*before, "umount", "-l", str(place)], check=True)


def test_a_full_disk_is_said_and_damages_nothing(small_disk, tmp_path, fault):
    sweep = load_sweep("smoke", sizes=["50K"], arms=["discrete-raster"])
    train = dataclasses.replace(sweep.runs[0].train, batch=8, steps=60, decay_steps=15, warmup_steps=4)
    evaluate = dataclasses.replace(sweep.runs[0].evaluate, val_images=16, geneval_images_per_prompt=0, fd_images=0)
    data = dataclasses.replace(sweep.runs[0].data, images_unique=64)
    spec = dataclasses.replace(sweep.runs[0], train=train, evaluate=evaluate, data=data)
    often = Placement(device="cpu", checkpoint_steps=5)
    straight = run(spec, tmp_path / "straight" / spec.id, often)
    plan = make_plan(dataclasses.replace(sweep, runs=(spec,)), Machine(load_profile("cpu"), 1))
    runs = small_disk / "runs"
    queue = local.prepare(plan, runs, "one", retry_failed=False)
    folder = RunFolder(runs / spec.id)
    content = json.loads((folder.path / "placement.json").read_text())
    write_json(folder.path / "placement.json", {**content, "checkpoint_steps": 5})

    def fill_up() -> bool:
        """Asked once a step; in the middle of the run everything that is free is taken."""
        if folder.status.get("step", 0) >= 25 and not (small_disk / "others").exists():
            with open(small_disk / "others", "wb", buffering=0) as others, pytest.raises(OSError):
                while True:
                    others.write(b"\0" * 4096)
        return False

    worker = Worker(queue, StopSignal(), lambda s, d, p, stop: run(s, d, p, fill_up) and None)
    with pytest.raises(OSError, match="No space left"):
        worker.train(spec.trunk_id)
    status = folder.status
    assert status["state"] == "stopped" and "No space left on device" in status["error"]
    (small_disk / "others").unlink()
    Worker(queue, StopSignal()).train(spec.trunk_id)
    weights = [RunFolder(path).weights.read_bytes() for path in (folder.path, tmp_path / "straight" / spec.id)]
    assert weights[0] == weights[1] and straight is not None
    assert not list(folder.checkpoints.glob(".*.tmp"))
    fault(
        "a full disk",
        then="the run gives up its ballast to say so, and its worker ends; with room again the same command goes on",
        repeated="those since the last checkpoint",
        leaves="status stopped: No space left on device; no half-written file",
    )
