"""From a table to the whole report: laws.json, figures, one offline page; two results compared."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.changes import changes, in_words
from analysis.diagnostics import learning_curves
from analysis.figures import metric_along
from analysis.fit_laws import main
from analysis.listings import glance
from analysis.published import TABLE
from analysis.report import build
from analysis.simulate import ARMS, LADDER, ladder
from analysis.study import Choice, study
from analysis.table import prepare
from analysis.words import digits, rounded, summary
from slurm.trained import write_per_step

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with samples and learning curves, fitted once."""
    root = tmp_path_factory.mktemp("project")
    out = root / "results/simulated"
    (out / "samples").mkdir(parents=True)
    frame = ladder()
    frame.loc[7, "status"] = "diverged"
    frame.to_csv(out / "runs.csv", index=False)
    for arm in ARMS:
        for size in LADDER:
            Image.new("RGB", (16, 16), (200, 30, 30)).save(out / "samples" / f"{'-'.join(arm)}-{size}.png")
    for _, row in frame[frame["images"] == 96_000].iterrows():
        folder = root / "runs" / row["run_id"]
        folder.mkdir(parents=True)
    steps = range(1, 1500, 25)
    curve = [64.0 * s for s in steps], [1 + s**-0.3 for s in steps]
    write_per_step(out / "per_step.parquet", [(run, curve) for run in frame["run_id"]])
    assert main([str(out / "runs.csv"), "--out", str(out), "--no-report"]) == 0
    return out


@pytest.fixture(scope="module")
def report(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report, drawn once and from laws.json and the samples alone, over an earlier one's figure."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "laws.json").write_bytes((results / "laws.json").read_bytes())
    (alone / "report/figures").mkdir(parents=True)
    (alone / "report/figures/of-an-earlier-report.svg").touch()
    return build(alone / "laws.json", results / "samples").parent


def test_at_a_glance_runs_along_the_ladder_from_mean_to_mean_of_its_seeds(tmp_path: Path) -> None:
    frame = ladder(seeds=(0, 1))
    frame = frame[frame["size"] == frame["size"].iloc[-1]]
    frame.to_csv(tmp_path / "runs.csv", index=False)
    assert main([str(tmp_path / "runs.csv")]) == 0
    doc = json.loads((tmp_path / "laws.json").read_text())
    losses = frame.groupby(["token_kind", "order", "images"])["val_loss"].mean().astype(float)
    cells = {row[0]: row[1] for row in glance(doc).rows}
    assert len(cells) == 4
    for (kind, order), arm in losses.groupby(level=[0, 1]):
        first, last = arm.iloc[0], arm.iloc[-1]
        assert first > last and cells[f"{kind} · {order}"] == f"{digits(first)} → {digits(last)}"
    assert (tmp_path / "report/figures/val_loss-vs-d.png").is_file()
    assert not (tmp_path / "report/figures/val_loss-vs-n.png").exists()


def test_a_size_has_one_entry_beside_its_learning_curves_however_many_seeds(results: Path) -> None:
    doc = json.loads((results / "laws.json").read_text())
    doc["learning_curves"] = [c for c in reversed(doc["learning_curves"]) for _ in range(3)]
    figure = learning_curves(doc)
    assert figure is not None and len(figure.axes) == len(ARMS)
    for ax in figure.axes:
        legend = ax.get_legend()
        assert legend is not None and [text.get_text() for text in legend.get_texts()] == list(LADDER)
        assert len(ax.get_lines()) == 3 * len(LADDER)


def test_laws_json_has_what_is_promised(results: Path) -> None:
    doc = json.loads((results / "laws.json").read_text())
    assert {"version", "table", "choice", "fits", "allocation", "verdicts", "recommended_runs"} <= set(doc)
    assert {"objective", "delta", "penalty", "floor", "interval"} <= set(doc["choice"])
    assert {"n", "d", "c", "cluster", "se"} <= set(doc["table"]["columns"])
    assert doc["table"]["n_rows"] == 60 and doc["table"]["sha256"] and doc["table"]["excluded"][0]["row"] == 7
    for f in doc["fits"]:
        promised = {"group", "metric", "unit", "law", "objective", "params", "intervals", "n_runs", "starts", "aicc"}
        assert promised | {"rollout", "warnings"} <= set(f)
        for name, value in f["params"].items():
            low, high = f["intervals"][name]
            assert low <= value <= high
    wide = [f for f in doc["fits"] if f["half_widths"].get("alpha", 0) > 0.1]
    assert wide and all("alpha" not in f["headline"] for f in wide)
    chinchilla = next(f for f in doc["fits"] if f["law"] == "chinchilla")
    assert set(chinchilla["params"]) == {"E", "A", "B", "alpha", "beta"}
    assert chinchilla["n_runs"] == 14 and chinchilla["n_clusters"] == 5


def test_a_known_exponent_is_found_and_the_floor_is_the_measured_one(results: Path) -> None:
    doc = json.loads((results / "laws.json").read_text())
    fd = next(
        f for f in doc["fits"] if f["metric"] == "fd" and f["group"] == {"token_kind": "continuous", "order": "random"}
    )
    assert fd["params"]["E"] == pytest.approx(1.2) and fd["fixed"] == {"E": pytest.approx(1.2)}
    assert fd["params"]["alpha"] == pytest.approx(0.45, abs=0.03)


def test_the_page_is_one_offline_file(results: Path, report: Path) -> None:
    page = (report / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](https?:|//|figures/)""", page)
    assert page.count("data:image/png;base64,") >= 12 + 20
    assert "<table" in page and 'name="viewport"' in page and "@media print" in page
    for section in (
        "The published claims",
        "Samples by size",
        "From loss to metric",
        "Size or data",
        "Can it be trusted",
    ):
        assert section in page
    assert json.loads((results / "laws.json").read_text())["table"]["sha256"] in page


def test_figures_are_there_in_both_formats(report: Path) -> None:
    folder = report / "figures"
    assert not (folder / "of-an-earlier-report.svg").exists()
    names = {p.stem for p in folder.glob("*.png")}
    assert {f"{metric}-vs-{axis}" for metric in ("val_loss", "fd", "geneval") for axis in "nc"} <= names
    others = {
        "val_loss-vs-d",
        "score-tags",
        "loss-to-metric",
        "allocation",
        "residuals",
        "learning-curves",
        "calibration",
    }
    assert others <= names
    for name in names:
        assert Image.open(folder / f"{name}.png").width >= 600
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    markdown = (report / "report.md").read_text()
    assert all(f"figures/{name}.png" in markdown for name in names)


def test_no_headline_beyond_what_the_data_carry(results: Path, report: Path) -> None:
    doc = json.loads((results / "laws.json").read_text())
    top = (report / "report.md").read_text().split("##")[0]
    for said in re.findall(r"(\d\.\d+) ± (\d\.\d+) \(", top):
        assert float(said[1]) <= 0.1
    doc["fits"] = [{**f, "headline": []} for f in doc["fits"]]
    assert "± " in top and "that the data carry" not in " ".join(summary(doc))
    assert "The data carry no exponent" in " ".join(summary(doc))


def test_the_headline_takes_the_better_law_first(results: Path) -> None:
    """A worse law with narrower intervals must not speak for the data."""
    doc = json.loads((results / "laws.json").read_text())
    joint = [f for f in doc["fits"] if f["metric"] == "val_loss" and len(f["axes"]) == 2]
    for f in joint:
        f["headline"], f["aicc"] = (["alpha_N"], 9.0) if f["law"] == "kaplan" else ([], -9.0)
    doc["fits"] = joint
    assert "kaplan" not in " ".join(summary(doc))


def said_of(frame: pd.DataFrame, folder: Path, *options: str) -> tuple[dict, str]:
    """laws.json of a table of others, and the summary in one string."""
    frame.to_csv(folder / "table.csv", index=False)
    names = [part for column in ("n", "d", "c") if column in frame for part in (f"--{column}", column)]
    command = [str(folder / "table.csv"), *names, "--metric", "loss", *options]
    assert main([*command, "--out", str(folder), "--no-report"]) == 0
    doc = json.loads((folder / "laws.json").read_text())
    return doc, " ".join(summary(doc))


def test_a_law_without_a_floor_is_a_headline_only_where_it_was_asked_for(tmp_path: Path) -> None:
    """3 % noise hides a floor of a fifth of the loss: Kaplan's law is the better by AICc, and wrong in alpha."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(46e3, 950e3, 5), np.geomspace(24e3, 96e3, 3)))
    mean = 0.03 + 0.06 * (n / 950e3) ** -0.34 + 0.03 * (d / 96e3) ** -0.30
    loss = mean * np.exp(0.03 * np.random.default_rng(0).normal(size=15))
    frame = pd.DataFrame({"n": n, "d": d, "loss": loss})
    doc, said = said_of(frame, tmp_path)
    kaplan = next(f for f in doc["fits"] if f["law"] == "kaplan")
    assert kaplan["aicc"] == min(f["aicc"] for f in doc["fits"] if len(f["axes"]) == 2 and f["aicc"] is not None)
    low, high = kaplan["intervals"]["alpha_N"]
    assert kaplan["half_widths"]["alpha_N"] < 0.1 and not low < 0.34 < high, "what was printed"
    assert kaplan["headline"] == [] and "(kaplan" not in said
    asked, said = said_of(frame, tmp_path, "--law", "kaplan")
    assert asked["fits"][0]["headline"] and re.search(r"alpha_N 0\.\d+ ± 0\.\d+.*\(kaplan, joint in N and D\)", said)


def test_a_table_of_compute_alone_has_its_exponent_in_the_summary(tmp_path: Path) -> None:
    c = np.geomspace(1e18, 1e22, 10)
    loss = (1.7 + 1e3 * c**-0.16) * np.exp(0.0005 * np.random.default_rng(0).normal(size=10))
    said = said_of(pd.DataFrame({"c": c, "loss": loss}), tmp_path)[1]
    assert re.search(r"alpha 0\.1[56]\d* ± 0\.\d+ \(compute, along C\)", said) and "carry no exponent" not in said


def test_a_second_run_from_any_directory_gives_the_same(results: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "analysis/fit_laws.py", results / "runs.csv", "--out", "x", "--no-report"]
    done = subprocess.run([*command, "--json", "--runs", "none"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((p / "laws.json").read_text()) for p in (results, tmp_path / "x"))
    assert json.loads(done.stdout) == second
    for key in ("fits", "allocation", "contrasts", "crossings", "chances", "links", "verdicts"):
        assert first[key] == second[key]


def test_the_analysis_imports_neither_torch_nor_the_rest_of_the_project() -> None:
    probe = (
        "import sys; sys.path.insert(0, sys.argv[1]); import analysis.fit_laws, analysis.report, analysis.recommend;"
        "print([m for m in ('torch', 'fluidscale', 'slurm', 'mlflow', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe, ROOT], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_published_sizes_with_a_forecast(tmp_path: Path) -> None:
    """Five points: the forecast for 30B is given with its interval and flagged as resting on five sizes."""
    options = ["--n", "params_total", "--metric", "fid", "--metric", "geneval", "--predict", "n=3e10"]
    assert main([str(TABLE), *options, "--out", str(tmp_path), "--no-report"]) == 0
    doc = json.loads((tmp_path / "laws.json").read_text())
    for f, (low, high) in zip(doc["fits"], ((5.5, 6.7), (0.6, 0.85)), strict=True):
        said = f["forecasts"][0]
        assert "FEW_SIZES" in {w["code"] for w in f["warnings"]} and f["headline"] == [] and said["n_runs"] == 5
        assert low < said["run_low"] < said["mean"] < said["run_high"] < high
        assert said["decades"] == pytest.approx(np.log10(30 / 10.5))


def test_the_overlay_is_marked_as_another_protocol(results: Path, tmp_path: Path) -> None:
    table = [str(results / "runs.csv"), "--metric", "geneval"]
    assert main([*table, "--out", str(tmp_path), "--overlay", "--no-report"]) == 0
    doc = json.loads((tmp_path / "laws.json").read_text())
    assert {o["metric"] for o in doc["overlay"]} == {"fid", "geneval"}
    figure = metric_along(doc, "geneval", "n")
    assert figure is not None
    said = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    foreign = [name for name in said if name.endswith("(its protocol)")]
    assert len(foreign) == 1 and len(said) == len(ARMS) + 1


def studied(frame: pd.DataFrame):
    return study(prepare(frame, "", "frame"), Choice(metrics=("val_loss", "geneval")))


def test_two_results_compared() -> None:
    base = ladder(seeds=(0, 1), noise=0.002)
    better = ladder(seeds=(0, 1), noise=0.002, random_state=5)
    better = better.assign(val_loss=better["val_loss"] * np.where(better["order"] == "random", 0.93, 1.0))
    better["run_id"] = better["run_id"] + "-b"
    first = studied(base)
    found = changes(first, studied(better), 0.95)
    moved = {(m["metric"], m["group"]["order"]) for m in found["metrics"] if m["changed"]}
    assert moved == {("val_loss", "random")}
    assert len(found["rows"]["new"]) == len(found["rows"]["gone"]) == 120
    same = changes(first, first, 0.95)
    assert not any(c["changed"] for c in same["parameters"] + same["metrics"])
    assert "0 new, 0 gone" in in_words(same)
    other = changes(first, studied(base.assign(val_loss_unit="bits")), 0.95)
    assert {u["metric"] for u in other["unlike"]} == {"val_loss"}


def test_numbers_are_printed_with_the_digits_they_carry() -> None:
    assert (
        digits(0.35) == "0.3500"
        and digits(12345.678) == "12346"
        and digits(None) == "–"
        and digits(1.5e7) == "1.500e+07"
    )
    assert rounded(0.34449, 0.08) == "0.34 ± 0.08"
    assert rounded(0.34449, 0.0062) == "0.344 ± 0.006"
    assert rounded(0.34449, 0.013) == "0.344 ± 0.013"
