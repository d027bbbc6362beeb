"""Real services for the tests marked `cluster`, and a sweep small enough for them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mini_slurm
import pytest
from mlflow_server import Server

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
# Three data sizes a trunk, four trunks: a minute of work on two cores.
SWEEP = f"""
extends: {SWEEPS / "smoke"}
sizes: [50K]
arms: all
seeds: [0]
images: [480, 960, 19200]
defaults:
  data: {{images_unique: 64}}
  train: {{batch: 8, warmup_steps: 4}}
  evaluate: {{val_images: 16, geneval_images_per_prompt: 0, fd_images: 0}}
"""
# The cluster's nodes have no GPU; a checkpoint every second or so, so that a fault finds one.
RESOURCES = """
slurm: {device: cpu, threads: 1, precision: 32-true, partition: low, minutes: 30, memory_gb: 0,
        checkpoint_minutes: 0.02, evaluation: {minutes: 20}}
"""


def lacking(what: str) -> None:
    """Ends a test whose service is not there: skipped by hand, failed in CI, where the set-up must provide it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must provide {what}")
    pytest.skip(f"no {what} here")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A SLURM of four nodes with accounting."""
    if missing := mini_slurm.missing():
        lacking(", ".join(missing))
    with mini_slurm.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """Options of the launcher for the small sweep: its file and where it runs."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mini.yaml").write_text(SWEEP)
    (folder / "resources.yaml").write_text(RESOURCES)
    return folder


def pytest_collection_modifyitems(items):
    """What waits for the reference comes last: it is trained beside the others."""
    items.sort(key=lambda item: not {"mirrored", "postgres"}.isdisjoint(item.fixturenames))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("mlflow"), mini_slurm.free_ports(1)[0])
    try:
        running.start()
        yield running
    finally:
        if running.process is not None and running.process.poll() is None:
            running.kill()


@dataclass(frozen=True)
class Reference:
    """The small sweep, trained by one process of this machine that nothing disturbs."""

    runs: Path
    table: Path
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> None:
        self.process.wait(1800)
        assert self.table.exists(), self.log.read_text()


@pytest.fixture(scope="session")
def undisturbed(sweep):
    """The reference sweep while it is being trained, beside whatever is tested."""
    command = [sys.executable, "-m", "slurm.launch", "submit", str(sweep / "mini.yaml"), "--cluster", "debug"]
    command += ["--profile", "cpu", "--runs", str(sweep / "reference"), "--results", str(sweep / "results")]
    log = sweep / "reference.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield Reference(sweep / "reference", sweep / "results" / "mini" / "runs.csv", process, log)
    if process.poll() is None:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def mirrored(undisturbed, server):
    """The finished reference runs, mirrored to the server by the command that users have."""
    undisturbed.wait()
    command = [sys.executable, "-m", "fluidscale.sync", str(undisturbed.runs), "--tracking-uri", server.uri]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    return undisturbed.runs
