"""The MLflow mirror against a real store: number for number, one run per spec, a dead tracker harms nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from fluidscale.folder import RunFolder
from fluidscale.record import Placement, write_atomic, write_json
from fluidscale.run import run
from fluidscale.spec import to_json
from fluidscale.sync import level, main

OFTEN = Placement(device="cpu", checkpoint_steps=5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_spec):
    folder = tmp_path_factory.mktemp("runs")
    spec = tiny_spec("discrete-raster", steps=60, decay_steps=15)
    run(spec, folder / spec.id, OFTEN)
    write_json(folder / "sweeps" / "mine.json", {"sweep": "mine", "runs": [spec.id]})
    return folder


@pytest.fixture(scope="module")
def mirror(runs):
    from fluidscale.train.tracking import Mirror

    return Mirror(runs)


def only_run(mirror):
    found = mirror._client.search_runs([mirror.experiment("mine")])
    assert len(found) == 1
    return found[0]


def history(mirror, key):
    """The value that counts at each step: the latest written."""
    points = mirror._client.get_metric_history(only_run(mirror).info.run_id, key)
    return {p.step: p.value for p in sorted(points, key=lambda p: p.timestamp)}


def test_the_store_equals_the_files_number_for_number(runs, mirror):
    assert level(mirror, runs) == 0
    run_dir = next(runs.glob("discrete-*"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for key in ("train_loss", "lr", "grad_norm", "images_per_s"):
        assert history(mirror, key) == {line["step"]: line[key] for line in lines}
    record = RunFolder(run_dir).record
    stored = only_run(mirror)
    assert stored.data.metrics["val_loss"] == record["val_loss"]
    assert stored.data.metrics["val_loss_se"] == record["val_loss_se"]
    assert stored.info.status == "FINISHED"
    assert float(stored.data.params["train.lr"]) == record["lr"]
    names = {a.path for a in mirror._client.list_artifacts(stored.info.run_id)}
    assert {"spec.json", "record.json", "log.txt"} <= names


def test_a_second_pass_sends_nothing_and_a_lost_state_file_finds_its_run_again(runs, mirror):
    level(mirror, runs)
    run_dir = next(runs.glob("discrete-*"))
    assert mirror.push(run_dir, "mine") is False
    (run_dir / "mlflow.json").unlink()
    level(mirror, runs)
    assert only_run(mirror).data.tags["run_id"] == run_dir.name


def test_a_run_without_anything_new_is_not_read_again(runs, mirror):
    level(mirror, runs)
    run_dir = next(runs.glob("discrete-*"))
    spec = (run_dir / "spec.json").read_text()
    try:
        write_atomic(run_dir / "spec.json", "not to be read")
        assert mirror.push(run_dir, "mine") is False
        RunFolder(run_dir).set_status("done")
        with pytest.raises(ValueError, match="not JSON"):
            mirror.push(run_dir, "mine")
    finally:
        write_atomic(run_dir / "spec.json", spec)


def test_a_repeated_step_counts_once_with_its_later_value(runs, mirror):
    level(mirror, runs)
    folder = RunFolder(next(runs.glob("discrete-*")))
    before = folder.metrics.read_text()
    last = json.loads(before.splitlines()[-1])
    folder.append_metrics({**last, "images_per_s": 123.0, "time": time.time()})
    level(mirror, runs)
    assert history(mirror, "images_per_s")[last["step"]] == 123.0
    folder.metrics.write_text(before)


def test_a_rebuilt_store_equals_the_first(runs, mirror, tmp_path):
    from fluidscale.train.tracking import Mirror

    level(mirror, runs)
    fresh = Mirror(runs, f"sqlite:///{tmp_path / 'other.db'}")
    level(fresh, runs)
    assert history(fresh, "train_loss") == history(mirror, "train_loss")
    assert only_run(fresh).data.params == only_run(mirror).data.params
    level(mirror, runs)


def _delete_the_database(runs):
    shutil.rmtree(runs / "mlflow")


def _delete_the_run(runs):
    from fluidscale.train.tracking import Mirror

    mirror = Mirror(runs)
    mirror._client.delete_run(only_run(mirror).info.run_id)


def _delete_the_experiment(runs):
    from fluidscale.train.tracking import Mirror

    mirror = Mirror(runs)
    mirror._client.delete_experiment(mirror.experiment("mine"))


@pytest.mark.parametrize("delete", [_delete_the_database, _delete_the_run, _delete_the_experiment])
def test_what_was_deleted_from_the_store_is_made_again(runs, mirror, tmp_path, delete):
    from fluidscale.train.tracking import Mirror

    level(mirror, runs)
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy, ignore=shutil.ignore_patterns("mlflow*"))
    # In processes of their own: this one would keep a deleted database open.
    command = [sys.executable, "-m", "fluidscale.sync", str(copy)]
    subprocess.run(command, check=True, timeout=120)
    delete(copy)
    subprocess.run(command, check=True, timeout=120)
    assert history(Mirror(copy), "train_loss") == history(mirror, "train_loss")


def test_a_server_that_is_not_there_is_said_and_harms_nothing(runs):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fluidscale.sync", str(runs), "--tracking-uri", f"http://127.0.0.1:{port}"]
    environment = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert answer.returncode == 1 and "not mirrored" in answer.stderr and "Traceback" not in answer.stderr


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_run_whose_job_is_gone_is_closed_and_opened_again_when_it_goes_on(runs, mirror):
    level(mirror, runs)
    folder = RunFolder(next(runs.glob("discrete-*")))
    before = (folder.path / "status.json").read_text()
    for state, expected in (("lost", "KILLED"), ("running", "RUNNING"), ("done", "FINISHED")):
        write_json(folder.path / "status.json", {**json.loads(before), "state": state})
        level(mirror, runs)
        assert only_run(mirror).info.status == expected
    (folder.path / "status.json").write_text(before)


def test_no_secret_of_the_environment_is_written_anywhere(runs, tmp_path):
    """A password in the tracker's URI and one beside it; the server is not there, so that errors are told too."""
    for name in ("ours", "mlflow"):
        (tmp_path / name).mkdir()
    copy = tmp_path / "ours" / "runs"
    shutil.copytree(runs, copy, ignore=shutil.ignore_patterns("mlflow", "mlflow.json"))
    secrets = {"MLFLOW_TRACKING_PASSWORD": "hunter2-planted", "MLFLOW_TRACKING_USERNAME": "planted-user"}
    here = f"sqlite:///{tmp_path / 'mlflow' / 'store.db'}"
    for uri in ("http://somebody:sesame-planted@127.0.0.1:9/", here):
        environment = {**os.environ, **secrets, "MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        command = [sys.executable, "-m", "fluidscale.sync", str(copy)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
        assert "planted" not in said.stdout + said.stderr
        assert said.returncode == (0 if uri == here else 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.json" for path in files) and any(path.name == "store.db" for path in files)
    assert not [path for path in files if b"planted" in path.read_bytes()]


def test_a_run_speaks_to_no_tracker_in_its_own_process(tmp_path, tiny_spec):
    """Whatever the environment says: training imports no client, and opens no connection from any thread."""
    spec = tiny_spec("discrete-raster", steps=8, decay_steps=2)
    write_atomic(tmp_path / "spec.json", to_json(spec))
    code = (
        "import sys; calls = []\n"
        "sys.addaudithook(lambda event, args: calls.append(args) if event == 'socket.connect' else None)\n"
        "from fluidscale.run import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not calls, calls\n"
        "assert not {name for name in sys.modules if name.startswith('mlflow')}"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "spec.json"), "--dir", str(tmp_path / spec.id)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    answer = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert answer.returncode == 0, answer.stderr


def test_a_follower_whose_launcher_died_before_it_was_up_ends_by_itself(runs):
    script = f'"{sys.executable}" -m fluidscale.sync "{runs}" --follow --parent $$ >/dev/null 2>&1 & echo $!'
    follower = int(subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout)
    end = time.monotonic() + 120
    while os.path.exists(f"/proc/{follower}"):
        assert time.monotonic() < end, "it follows for nobody"
        time.sleep(0.2)
