"""Real services for the tests marked `cluster`, and a sweep small enough for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import mini_slurm
import pytest

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


@dataclass
class Server:
    """An MLflow server on loopback, on a database and a port that outlive its process."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        # Its runner of background jobs is of no use here and costs five processes.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            # A session of its own: signals reach its workers too.
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        mini_slurm.eventually(self._answers, f"the server's answer ({self.folder / 'server.log'})")

    def send(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False


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
