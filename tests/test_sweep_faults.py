"""A real sweep whose processes are killed at random moments ends with the table of an undisturbed one."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluidscale.record import VOLATILE
from fluidscale.sweep import SWEEPS
from slurm import claim, layout
from slurm.local import send

SWEEP = f"""
extends: {SWEEPS}/recipe
sizes: [50K]
arms: [continuous-random, discrete-raster]
seeds: [0]
images: [2048, 4096]
defaults:
  data: {{images_unique: 2048}}
  train: {{batch: 32, warmup_steps: 8}}
  evaluate: {{val_images: 32, geneval_images_per_prompt: 0, fd_images: 0}}
smaller_images: {{evaluate: {{geneval_images_per_prompt: 0}}}}
"""
PATIENCE = 900.0


@pytest.fixture
def launch(tmp_path):
    """Starts a launch in a process group of its own; at the end whatever still works is killed."""
    (tmp_path / "real.yaml").write_text(SWEEP)
    # A checkpoint every few steps, so that deaths fall into their writing too.
    (tmp_path / "own.yaml").write_text("cpu: {checkpoint_minutes: 0.01}\n")
    folders = set()

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folders.add(folder / "runs")
        command = [sys.executable, "-m", "slurm.launch", "submit", "real.yaml", "--profile", "cpu", "--resources"]
        command += ["own.yaml", "--runs", str(folder / "runs"), "--results", str(folder / "results")]
        with open(tmp_path / "output.txt", "ab") as output:
            return subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)

    yield start
    for folder in folders:
        for pid in workers(folder):
            send(pid, signal.SIGKILL)


def workers(runs: Path) -> list[int]:
    return [facts["pid"] for path in layout.slots(runs) if (facts := claim.holder(path))]


def lines_logged(runs: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in runs.glob("*/metrics.jsonl"))


def wait_for_lines(runs: Path, count: int, launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while lines_logged(runs) < count and launcher.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.05)


def faithful_rows(results: Path) -> list[dict[str, str]]:
    with open(results / "real" / "runs.csv") as table:
        return [{key: cell for key, cell in row.items() if key not in VOLATILE} for row in csv.DictReader(table)]


def test_a_sweep_killed_in_every_way_ends_as_an_undisturbed_one(launch, tmp_path):
    straight, killed = tmp_path / "a", tmp_path / "b"
    assert launch(straight).wait(PATIENCE) == 0, (tmp_path / "output.txt").read_text()
    draw = random.Random(1)
    for victim in ("launcher", "group"):
        launcher = launch(killed)
        wait_for_lines(killed / "runs", lines_logged(killed / "runs") + 2, launcher)
        time.sleep(draw.random())
        if victim == "launcher":
            # A worker before it, which is replaced; the others outlive both.
            for pid in workers(killed / "runs")[:1]:
                send(pid, signal.SIGKILL)
            wait_for_lines(killed / "runs", lines_logged(killed / "runs") + 1, launcher)
            launcher.kill()
        elif launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert launch(killed).wait(PATIENCE) == 0, (tmp_path / "output.txt").read_text()
    rows = faithful_rows(straight / "results")
    assert len(rows) == 4 and all(row["val_loss"] for row in rows)
    assert faithful_rows(killed / "results") == rows
    assert not workers(killed / "runs")
