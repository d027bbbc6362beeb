"""Options that a table cannot answer end with one line; those that it can are answered alike in any company."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_analysis_table import frame, outcome, refused

from analysis.fit_laws import main
from analysis.listings import matches
from analysis.simulate import ladder
from analysis.table import load

BY_N = ("--n", "n", "--metric", "loss", "--law", "power-floor")


def test_a_laws_fit_does_not_depend_on_the_other_laws_that_were_asked_for(tmp_path: Path) -> None:
    n = np.geomspace(1e6, 1e9, 8)
    error = 0.5 * (n / 1e6) ** -0.3 * np.exp(0.01 * np.random.default_rng(0).normal(size=8))
    table = pd.DataFrame({"n": n, "loss": error})

    def fits(*laws: str) -> dict[str, dict]:
        doc = outcome(table, tmp_path, "--n", "n", *(word for name in laws for word in ("--law", name)))
        return {f["law"]: f["params"] for f in doc["fits"]}

    alone = fits("logit") | fits("power")
    assert fits("logit", "power") == fits("power", "logit") == alone
    assert alone["power"]["alpha"] == pytest.approx(0.3, abs=0.01) and alone["logit"]["slope"] < 0


def test_laws_and_objectives_of_scores_are_for_scores_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loss = ladder().drop(columns=["fd", "geneval"])
    for options in (("--law", "logit"), ("--law", "power", "--objective", "quasi-binomial")):
        assert refused(loss, tmp_path, capsys, "--metric", "val_loss", *options) == "NOT_A_SCORE"
    share = pd.DataFrame({"n": np.geomspace(1e6, 1e9, 8), "acc": np.linspace(0.2, 0.9, 8)})
    own = ("--n", "n", "--metric", "acc", "--objective", "quasi-binomial")
    assert refused(share, tmp_path, capsys, *own, "--law", "power") == "NOT_A_SCORE"
    assert main([str(tmp_path / "points.csv"), *own, "--law", "logit", "--no-report"]) == 0


@pytest.mark.parametrize("code, options", [
    ("BAD_FLOOR", ("--floor", "nan")), ("BAD_FLOOR", ("--floor=-0.5",)), ("BAD_DELTA", ("--delta", "inf")),
    ("BAD_PENALTY", ("--penalty", "inf")), ("BAD_LEVEL", ("--level", "nan")), ("BAD_PLACE", ("--predict", "d=1e9")),
])  # fmt: skip
def test_numbers_that_mean_nothing_end_with_one_line(
    code: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert refused(frame(), tmp_path, capsys, *BY_N, *options) == code


@pytest.mark.parametrize("name", ["power", "kaplan", "kaplan-floor", "broken"])
def test_a_law_without_a_free_floor_has_no_place_for_negative_values(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = frame().assign(loss=frame()["loss"] - 3.0)
    options = ("--n", "n", "--d", "d", "--metric", "loss", "--objective", "lse", "--law", name)
    assert refused(table, tmp_path, capsys, *options) == "NON_POSITIVE"


@pytest.mark.parametrize("runs", [["x"], [{"token_kind": "continuous"}], [7], [{"params_total": "many"}]])
def test_a_plan_of_other_rows_ends_with_one_line(runs: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"runs": runs}))
    assert refused(frame(), tmp_path, capsys, *BY_N, "--plan", str(tmp_path / "plan.json")) == "UNREADABLE_PLAN"


def test_a_table_of_data_sizes_alone_is_refused_or_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    d = np.geomspace(1e9, 1e11, 8)
    table = pd.DataFrame({"d": d, "c": d * 6e8, "loss": 1.7 + 400 * d**-0.28})
    assert refused(table, tmp_path, capsys, "--d", "d", "--metric", "loss") == "NO_LAW"
    assert main([str(tmp_path / "points.csv"), "--d", "d", "--c", "c", "--metric", "loss"]) == 0
    assert (tmp_path / "report" / "index.html").is_file()


def test_arms_of_a_table_without_data_sizes_are_set_side_by_side(tmp_path: Path) -> None:
    n = np.geomspace(1e8, 1e10, 6)
    noise = np.exp(1e-3 * np.random.default_rng(0).normal(size=12))
    loss = np.concatenate([1.7 + 400 * n**-0.34, 1.02 * (1.7 + 400 * n**-0.34)]) * noise
    table = pd.DataFrame({"n": np.tile(n, 2), "arm": ["a"] * 6 + ["b"] * 6, "loss": loss})
    doc = outcome(table, tmp_path, "--n", "n", "--group", "arm")
    assert [(row[3], row[4]) for row in matches(doc).rows] == [("images", "–"), ("parameters", "10B")]


def test_another_count_of_parameters_leaves_the_other_columns_of_our_own_tables_as_they_are(tmp_path: Path) -> None:
    ladder().to_csv(tmp_path / "runs.csv", index=False)
    table = load(tmp_path / "runs.csv", n="params_body")
    assert table.columns.n == "params_body"
    assert replace(table.columns, n="params_total") == load(tmp_path / "runs.csv").columns
    ladder().drop(columns="schema_version").to_csv(tmp_path / "others.csv", index=False)
    others = load(tmp_path / "others.csv", n="params_total").columns
    assert (others.d, others.c, others.group) == (None, None, ())
