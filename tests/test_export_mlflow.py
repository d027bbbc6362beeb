"""An experiment of a real MLflow store as a table: the laws of the exported table are those of the runs' own."""

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from analysis.fit_laws import main as fit_laws
from fluidscale.export_mlflow import main
from fluidscale.folder import RunFolder
from fluidscale.record import planned, table_csv, table_row, varying, write_json
from fluidscale.spec import RunSpec, to_json
from fluidscale.sweep import load_sweep
from fluidscale.sync import level


def finish(runs: Path, spec: RunSpec, rng: np.random.Generator) -> None:
    """A finished run's files as a run leaves them, with a loss that follows a law."""
    folder, row = RunFolder(runs / spec.id), planned(spec)
    folder.path.mkdir(parents=True)
    loss = 2.0 + 30 * row["params_total"] ** -0.3 + 50 * row["images"] ** -0.4
    score = {"val_loss": loss * np.exp(0.003 * rng.normal()), "val_loss_se": 0.001, "val_loss_unit": "nats/token"}
    (folder.path / "spec.json").write_text(to_json(spec))
    outcome = {"lr_decay_complete": True, "status": "done", "gpu_hours": 0.1 + 1 / 3, "finished_at": "now"}
    write_json(folder.path / "record.json", {**row, **score, "val_loss_n": 64, "val_loss_protocol": "p", **outcome})
    folder.set_status("done")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ of one arm of the local sweep, mirrored to a sqlite store, and the table that collecting would write."""
    root = tmp_path_factory.mktemp("project")
    specs, rng = load_sweep("local", arms=["discrete-raster"]).runs, np.random.default_rng(0)
    for spec in specs:
        finish(root / "runs", spec, rng)
    write_json(root / "runs" / "sweeps" / "mine.json", {"sweep": "mine", "runs": [s.id for s in specs]})
    from fluidscale.train.tracking import Mirror

    assert level(Mirror(root / "runs"), root / "runs") == 0
    varied = varying(specs)
    rows = [table_row(RunFolder(root / "runs" / s.id).record or {}, "mine", varied[s.id]) for s in specs]
    (root / "own.csv").write_text(table_csv(rows))
    return root


def uri(project: Path) -> str:
    return f"sqlite:///{project / 'runs' / 'mlflow' / 'mlflow.db'}"


def laws(table: Path, out: Path) -> list[dict]:
    assert fit_laws([str(table), "--out", str(out), "--no-report"]) == 0
    return json.loads((out / "laws.json").read_text())["fits"]


def test_the_exported_table_gives_the_same_laws(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    assert main(["mine", "--out", str(out), "--tracking-uri", uri(project)]) == 0
    assert sorted(out.read_text().splitlines()[1:]) == sorted((project / "own.csv").read_text().splitlines()[1:])
    found, own = laws(out, tmp_path / "a"), laws(project / "own.csv", tmp_path / "b")
    assert [f["law"] for f in found] == [f["law"] for f in own] and len(own) >= 3
    for a, b in zip(found, own, strict=True):
        assert a["params"] == pytest.approx(b["params"], rel=1e-4)  # rows come in another order


def test_runs_of_other_programs_give_params_and_metrics(project: Path, tmp_path: Path, capsys) -> None:
    client = MlflowClient(uri(project))
    experiment = client.create_experiment("foreign")
    for k, n in enumerate((1e6, 1e7, 1e8, 1e9)):
        run = client.create_run(experiment, run_name=f"r{k}").info.run_id
        client.log_param(run, "params", n)
        client.log_metric(run, "loss", 9.0)
        client.log_metric(run, "loss", 1.5 + 40 * n**-0.3)
        client.set_terminated(run, "FINISHED")
    client.create_run(experiment, run_name="still going")
    out = tmp_path / "table.csv"
    assert main(["foreign", "--out", str(out), "--tracking-uri", uri(project)]) == 0
    assert "still going" in capsys.readouterr().err
    options = ["--n", "params", "--metric", "loss", "--law", "power-floor", "--no-report"]
    assert fit_laws([str(out), *options, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "laws.json").read_text())["fits"][0]["params"]["alpha"] == pytest.approx(0.3)


def test_what_is_not_there_is_one_clear_line(project: Path, tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "t.csv"), "--tracking-uri"]
    assert main(["nothing", *out, uri(project)]) == 2
    assert "no experiment 'nothing' (known:" in capsys.readouterr().err
    assert main(["mine", *out, f"sqlite:///{tmp_path / 'none.db'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "none.db").exists()
