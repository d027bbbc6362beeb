"""Settings that vary within a size: part of the group where they cut ladders, else no law rests on such rows."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from analysis.fit_laws import main
from analysis.listings import contrasts, glance, remarks
from analysis.settings import is_setting, splitting, varied
from analysis.simulate import ladder
from analysis.study import Choice, study
from analysis.table import prepare
from analysis.words import summary

CELL = ["size", "images"]


def twice(column: str, values: tuple[object, object]) -> pd.DataFrame:
    """The simulated ladder made under two values of a setting."""
    parts = [ladder(random_state=k).assign(**{column: v}) for k, v in enumerate(values)]
    for k, part in enumerate(parts):
        part[["run_id", "trunk_id"]] += f"-{k}"
    return pd.concat(parts, ignore_index=True)


def rates_by_width() -> pd.DataFrame:
    """Two rates a size, each divided by the width: no value is shared between sizes."""
    frame = twice("lr", (1e-3, 2e-3))
    return frame.assign(lr=frame["lr"] * 1e4 / frame["params_total"])


def test_a_setting_that_cuts_ladders_becomes_part_of_the_group() -> None:
    frame = twice("model.mask_law", ("cosine", "uniform"))
    table = prepare(frame, "", "frame")
    assert table.columns.group == ("token_kind", "order", "model.mask_law")
    fits = study(table, Choice(metrics=("val_loss",), laws=("chinchilla",))).fits
    assert len(fits) == 8 and {f.points.group["model.mask_law"] for f in fits} == {"cosine", "uniform"}
    assert all(len(f.points) == 15 for f in fits)


def test_a_rate_that_follows_the_width_is_never_pooled() -> None:
    table = prepare(rates_by_width(), "", "frame")
    assert table.columns.group == ("token_kind", "order")
    result = study(table, Choice())
    assert not result.fits and {r["code"] for r in result.refused} == {"MIXED_SETTINGS"}
    assert all(p.mixed == ("lr",) for p in result.points) and result.sound == []


def test_tokenizers_are_called_by_what_tells_them_apart_else_by_their_hash() -> None:
    frame = twice("tokenizer_sha", ("5610af", "d469b4"))
    assert prepare(frame, "", "frame").columns.group == ("token_kind", "order", "tokenizer_sha")
    frame["model.token_channels"] = frame["tokenizer_sha"].map({"5610af": 4, "d469b4": 8})
    assert prepare(frame, "", "frame").columns.group == ("token_kind", "order", "model.token_channels")


def test_mixed_settings_are_shown_and_nothing_is_said_of_them(tmp_path: Path) -> None:
    rates_by_width().to_csv(tmp_path / "runs.csv", index=False)
    assert main([str(tmp_path / "runs.csv")]) == 0
    doc = json.loads((tmp_path / "laws.json").read_text())
    assert doc["fits"] == doc["contrasts"] == doc["doublings"] == doc["predictions"]["predictions"] == []
    assert len(doc["measurements"]) > 4 and "differ in lr" in doc["refused"][0]["message"]
    assert doc["verdicts"] == []
    page = (tmp_path / "report/index.html").read_text()
    assert "MIXED_SETTINGS" in page and (tmp_path / "report/figures/val_loss-vs-n.png").is_file()


def test_settings_of_one_size_stand_side_by_side_and_their_refusals_in_a_row_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    frame = twice("model.mask_law", ("cosine", "uniform"))
    frame = frame[(frame["size"] == frame["size"].iloc[-1]) & (frame["images"] == frame["images"].max())]
    better = frame.assign(seed=1, geneval=frame["geneval"] - 0.3 * (frame["model.mask_law"] == "cosine"))
    better[["run_id", "trunk_id"]] += "-again"
    frame = pd.concat([frame.assign(geneval=better["geneval"] + 0.01), better], ignore_index=True)
    frame.to_csv(tmp_path / "runs.csv", index=False)
    assert main([str(tmp_path / "runs.csv")]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 20
    figures = tmp_path / "report/figures"
    assert (figures / "geneval-side-by-side.png").is_file() and not (figures / "geneval-vs-n.png").exists()
    doc = json.loads((tmp_path / "laws.json").read_text())
    assert len(doc["refused"]) > 40 and doc["fits"] == []
    reasons = remarks(doc).rows
    assert len({reason for _, reason, _ in reasons}) == len(reasons) < 6
    assert reasons[0][1] == "the metric is the same in every run: there is no law to be fitted"
    assert reasons[0][2].startswith("validation loss in every arm: power-floor, compute, chinchilla, kaplan")
    assert "1 distinct N, the law needs 3 or more: add sizes" in [reason for _, reason, _ in reasons]
    kinds = {(a.split("-")[0], a.split("-")[-1]) for a in (row[0] for row in contrasts(doc).rows)}
    assert kinds == {(kind, law) for kind in ("continuous", "discrete") for law in ("cosine", "uniform")}
    for a, b, *_ in contrasts(doc).rows:
        assert sum(x != y for x, y in zip(a.split("-"), b.split("-"), strict=True)) == 1
    (line,) = [line for line in summary(doc) if line.startswith("GenEval-protocol score:")]
    assert line.startswith("GenEval-protocol score: 4 of 4 pairs of an arm's settings are told apart")
    (chance,) = [line for line in summary(doc) if "by chance" in line]
    assert re.match(r"\d+ comparisons were made: about 1 in 20 of", chance)
    assert glance(doc).headers == ["", "Validation loss", "Fréchet distance", "GenEval-protocol score"]


def test_mixed_settings_that_were_asked_for_by_name_end_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rates_by_width().to_csv(tmp_path / "runs.csv", index=False)
    assert main([str(tmp_path / "runs.csv"), "--metric", "val_loss", "--no-report"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fit_laws: [MIXED_SETTINGS]") and "--group" in error and len(error.splitlines()) == 1


def test_a_group_given_by_hand_is_kept() -> None:
    table = prepare(twice("lr", (1e-3, 2e-3)), "", "frame", group=("token_kind", "order", "lr"))
    assert len(study(table, Choice(metrics=("val_loss",), laws=("compute",))).fits) == 8


def test_what_follows_from_size_seed_or_data_is_no_mixture() -> None:
    frame = ladder(seeds=(0, 1))
    frame["model.width"], frame["lr"] = frame["params_total"] // 1000, 1e3 / frame["params_total"]
    frame["evaluate.fd_images"] = frame["images"] // 10 + frame["seed"]
    assert varied(frame, ["token_kind", "order", *CELL]) == [] == splitting(frame, ["token_kind", "order"], CELL)
    assert prepare(frame, "", "frame").columns.group == ("token_kind", "order")
    foreign = frame.drop(columns="schema_version").assign(lr=range(len(frame)))
    assert varied(foreign, CELL) == []
    assert is_setting("evaluate.sampling.solver") and is_setting("train.ema") and not is_setting("evaluate.fd_images")
