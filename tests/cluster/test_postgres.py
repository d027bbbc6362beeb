"""The mirror in a real Postgres: directly, without a server of MLflow's before it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import lacking
from mini_slurm import eventually, free_ports
from mlflow.tracking import MlflowClient
from test_mlflow_server import history, stored, sync

pytestmark = pytest.mark.cluster
USER, PASSWORD = "tracker", "a-secret-of-this-test"


def program(name: str) -> str | None:
    """Debian keeps Postgres' programs, a folder a version, off the path."""
    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(newest[-1]) if newest else shutil.which(name)


@pytest.fixture
def postgres():
    """URI of an empty database that only a password opens."""
    initdb, server = program("initdb"), program("postgres")
    if initdb is None or server is None:
        lacking("postgres")
    port, as_user = free_ports(1)[0], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        if os.getuid() == 0:
            # Postgres refuses to run as root.
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
            as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        data = str(folder / "data")
        options = ["--username", USER, "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
        subprocess.run([*as_user, initdb, "-D", data, *options], check=True, capture_output=True, cwd=folder)
        command = [*as_user, server, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", name]
        with open(folder / "server.log", "wb") as log:
            running = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            ready = "ready to accept connections"
            eventually(lambda: ready in (folder / "server.log").read_text(), "Postgres", 60)
            yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            # Its fast shutdown: SIGTERM would wait until every client has gone.
            running.send_signal(signal.SIGINT)
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def test_a_database_takes_the_mirror_without_a_server_and_no_file_tells_its_password(
    undisturbed, postgres, tmp_path, monkeypatch
):
    undisturbed.wait()
    folder = next(undisturbed.runs.glob("continuous-random-*/record.json")).parent
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    shutil.copytree(folder, runs / folder.name)
    shutil.copytree(undisturbed.runs / "sweeps", runs / "sweeps")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    answer = sync(runs, postgres)
    assert answer.returncode == 0, answer.stderr
    run = stored(client := MlflowClient(postgres), "mini")[folder.name]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert history(client, run.info.run_id, "train_loss") == {line["step"]: line["train_loss"] for line in lines}
    assert run.info.status == "FINISHED"
    kept = client.download_artifacts(run.info.run_id, "record.json", str(tmp_path))
    assert Path(kept).read_bytes() == (folder / "record.json").read_bytes()
    assert not list(elsewhere.iterdir()), "artifacts belong beside the runs, wherever the command is given"
    told = [path for path in runs.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    assert not told and PASSWORD not in answer.stdout + answer.stderr
