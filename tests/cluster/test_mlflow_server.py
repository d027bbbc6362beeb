"""The mirror against a real MLflow server: equal number for number, and a server that hangs or dies harms nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from fluidscale.folder import RunFolder
from fluidscale.record import flatten, read_json
from fluidscale.spec import canonical
from fluidscale.valid import run_spec_from_json
from slurm.mirror import Mirror

pytestmark = pytest.mark.cluster
# What a client waits for a server that does not answer; the defaults are longer, and no test needs to sit them out.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def sync(runs: Path, uri: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fluidscale.sync", str(runs), "--tracking-uri", uri]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def stored(client: MlflowClient, sweep: str) -> dict:
    """The experiment's runs by their spec's id; a spec with two runs is an error."""
    experiment = client.get_experiment_by_name(sweep)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    by_id = {run.data.tags["run_id"]: run for run in runs}
    assert len(by_id) == len(runs), "a spec has two MLflow runs"
    return by_id


def history(client: MlflowClient, run_id: str, key: str) -> dict[int, float]:
    points = client.get_metric_history(run_id, key)
    return {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}


def test_the_server_equals_the_files_number_for_number(server, mirrored):
    client = MlflowClient(server.uri)
    runs = stored(client, "mini")
    folders = sorted(path.parent for path in mirrored.glob("*/record.json"))
    assert sorted(runs) == [folder.name for folder in folders]
    for folder in folders:
        run, record = runs[folder.name], RunFolder(folder).record or {}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for key in ("train_loss", "lr", "grad_norm", "images_per_s"):
            assert history(client, run.info.run_id, key) == {line["step"]: line[key] for line in lines}
        for path in (folder / "eval").glob("*.json"):
            score = read_json(path) or {}
            assert run.data.metrics[score["metric"]] == score["value"] == record[score["metric"]]
        spec = run_spec_from_json((folder / "spec.json").read_text(), str(folder))
        assert run.data.params == {key: str(value) for key, value in flatten(canonical(spec)).items()}
        assert run.info.status == "FINISHED"
        kept = client.download_artifacts(run.info.run_id, "record.json")
        assert Path(kept).read_bytes() == (folder / "record.json").read_bytes()


def test_a_second_sync_sends_nothing_twice(server, mirrored):
    client = MlflowClient(server.uri)
    before = {name: run.info.run_id for name, run in stored(client, "mini").items()}
    some = next(iter(before.values()))
    points = len(client.get_metric_history(some, "train_loss"))
    assert sync(mirrored, server.uri).returncode == 0
    assert {name: run.info.run_id for name, run in stored(client, "mini").items()} == before
    assert len(client.get_metric_history(some, "train_loss")) == points


@pytest.fixture
def one_more_line(mirrored, tmp_path):
    """A copy of one mirrored run with a line that the server lacks: its folder and that line."""
    folder = next(mirrored.glob("discrete-*/record.json")).parent
    copy = tmp_path / "runs" / folder.name
    shutil.copytree(folder, copy)
    (tmp_path / "runs" / "sweeps").mkdir()
    shutil.copyfile(mirrored / "sweeps" / "mini.json", tmp_path / "runs" / "sweeps" / "mini.json")
    line = {"step": 9_999, "train_loss": 0.12345678901234567, "time": time.time()}
    RunFolder(copy).append_metrics(line)
    return copy, line


def arrived(server, folder: Path, line: dict) -> bool:
    client = MlflowClient(server.uri)
    run = stored(client, "mini")[folder.name]
    return history(client, run.info.run_id, "train_loss").get(line["step"]) == line["train_loss"]


def test_a_server_that_hangs_ends_a_sync_with_a_reason_and_holds_up_no_launcher(server, one_more_line, monkeypatch):
    folder, line = one_more_line
    server.send(signal.SIGSTOP)
    try:
        answer = sync(folder.parent, server.uri, **IMPATIENT)
        assert answer.returncode == 1 and "not mirrored" in answer.stderr and "Traceback" not in answer.stderr
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        with Mirror(folder.parent) as mirror:
            started = time.monotonic()
            mirror.keep_alive()
            assert time.monotonic() - started < 5, "starting the mirror waits for the server"
            mirror.patience = 1.0
            child = mirror._process
            assert child is not None and child.poll() is None
            started = time.monotonic()
        assert time.monotonic() - started < 30 and child.poll() is not None, "a hung mirror outlives its launcher"
    finally:
        server.send(signal.SIGCONT)
    assert sync(folder.parent, server.uri).returncode == 0
    assert arrived(server, folder, line)


def test_a_server_that_is_killed_is_brought_level_when_it_is_back(server, one_more_line):
    folder, line = one_more_line
    server.kill()
    answer = sync(folder.parent, server.uri, **IMPATIENT)
    assert answer.returncode == 1 and "not mirrored" in answer.stderr and "Traceback" not in answer.stderr
    server.start()
    assert sync(folder.parent, server.uri).returncode == 0
    assert arrived(server, folder, line)
