"""The best value of a setting that was varied at every size, and how it moves: against parabolas of known vertex."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fit_laws import main
from analysis.optima import optima
from analysis.points import Points
from analysis.simulate import chinchilla_points, ladder
from analysis.study import Choice, study
from analysis.table import prepare

BASE, FACTORS = 4e-3, (0.5, 1.0, 2.0, 4.0)


def tuned(power: float, at: float = 1.5) -> pd.DataFrame:
    """Each size at four rates; the loss is least at `at` times BASE (width / 100)^power, a parabola in the logs."""
    frame = ladder()
    frame = frame[(frame["images"] == frame["images"].max()) & (frame["order"] == "raster")]
    frame = frame[[c for c in frame.columns if not c.startswith(("geneval", "fd"))]]
    width, parts = np.sqrt(frame["params_total"].to_numpy(float) / 100), []
    for k, factor in enumerate(FACTORS):
        rate = factor * BASE * (width / 100) ** -1.0
        away = np.log(rate / (at * BASE * (width / 100) ** power))
        loss = frame["val_loss"].to_numpy(float) * np.exp(0.1 * away**2)
        names = frame["run_id"] + f"-{k}"
        columns = {"lr": rate, "model.width": width, "val_loss": loss, "val_loss_se": 1e-5 * loss, "run_id": names}
        parts.append(frame.assign(trunk_id=names, schema_version=1, **columns))
    return pd.concat(parts, ignore_index=True)


def found(frame: pd.DataFrame) -> list[dict]:
    table = prepare(frame, "", "frame")
    return optima(study(table, Choice()).points, table.frame, 0.95)


@pytest.mark.parametrize("power", [-1.0, -0.8])
def test_the_vertex_and_how_it_moves_are_found(power: float) -> None:
    rows = found(tuned(power))
    assert {tuple(r["group"].values()) for r in rows} == {("continuous", "raster"), ("discrete", "raster")}
    for row in rows:
        assert row["setting"] == "lr" and row["along"] == "width" and row["moves"][0] == pytest.approx(power, abs=1e-3)
        for s in row["sizes"]:
            width = np.sqrt(s["n"] / 100)
            assert s["best"] == pytest.approx(1.5 * BASE * (width / 100) ** power, rel=1e-3) and not s["at_end"]
            assert _holds(s) or power != -1.0


def test_what_is_best_at_an_end_is_said_and_moves_nothing() -> None:
    for row in found(tuned(-1.0, at=40.0)):
        assert all(s["at_end"] and s["best"] == s["values"][-1] for s in row["sizes"]) and row["moves"] is None


def noisy(noise: float, rng: np.random.Generator) -> tuple[Points, pd.DataFrame]:
    """Five widths at four rates each, 1.5 times BASE the best at width 100 and as 1 / width elsewhere."""
    width, factor = (v.ravel() for v in np.meshgrid([21.0, 31.0, 44.0, 63.0, 97.0], FACTORS))
    rate = factor * BASE * 100 / width
    y = np.exp(0.1 * np.log(factor / 1.5) ** 2 + noise * rng.normal(size=len(width)))
    points = chinchilla_points(100 * width**2, np.full(len(width), 1e6), 0.0, rng)
    frame = pd.DataFrame({"_row": points.rows, "lr": rate, "model.width": width})
    return replace(points, y=y, se=noise * y, mixed=("lr",)), frame


@pytest.mark.parametrize("noise", [0.003, 0.02])
def test_intervals_cover(noise: float) -> None:
    inside, moved = [], []
    for seed in range(200):
        points, frame = noisy(noise, np.random.default_rng(seed))
        (row,) = optima([points], frame, 0.95)
        moved.append(row["moves"][1] <= -1.0 <= row["moves"][2])
        inside += [_holds(s) for s in row["sizes"]]
    assert 0.92 <= np.mean(inside) <= 0.98 and 0.91 <= np.mean(moved) <= 0.99


@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_cover_what_seeds_do(seeds: int) -> None:
    """Seeds differ by far more than an evaluation errs."""
    inside, moved = [], []
    for trial in range(200):
        rng = np.random.default_rng(trial)
        points, frame = noisy(0.0, rng)
        rows = np.arange(seeds * len(points))
        y = np.tile(points.y, seeds) * np.exp(0.01 * rng.normal(size=len(rows)))
        many = replace(points.take(np.tile(np.arange(len(points)), seeds)), y=y, se=1e-4 * y, rows=rows, cluster=rows)
        (row,) = optima([many], pd.concat([frame] * seeds).assign(_row=rows), 0.95)
        moved.append(row["moves"][1] <= -1.0 <= row["moves"][2])
        inside += [_holds(s) for s in row["sizes"]]
    assert 0.92 <= np.mean(inside) <= 0.99 and 0.91 <= np.mean(moved) <= 0.99


def _holds(s: dict) -> bool:
    low, high = (end or tried for end, tried in zip(s["interval"], (s["values"][0], s["values"][-1]), strict=True))
    return low <= 1.5 * BASE * 100 / np.sqrt(s["n"] / 100) <= high


def test_a_size_with_too_few_values_and_one_without_differences_are_left_out() -> None:
    frame = tuned(-1.0)
    names = list(dict.fromkeys(frame["size"]))
    few = (frame["size"] == names[0]) & frame["run_id"].str.endswith(("-0", "-1"))
    level = frame["size"] == names[1]
    for row in found(frame[~few].assign(val_loss=np.where(level, 1.0, frame["val_loss"])[~few])):
        assert [s["size"] for s in row["sizes"]] == names[2:]


def test_without_all_widths_it_moves_along_parameters() -> None:
    frame = tuned(-1.0)
    frame.loc[frame["size"] == frame["size"].iloc[0], "model.width"] = np.nan
    for row in found(frame):
        assert row["along"] == "N" and row["moves"][0] == pytest.approx(-0.5, abs=1e-3)


def test_two_varied_settings_or_two_values_have_no_best_one() -> None:
    frame = tuned(-1.0)
    assert found(frame.assign(batch=(1e6 * frame["lr"]).round())) == []
    assert found(frame[frame["run_id"].str.endswith(("-0", "-1"))]) == []
    assert found(ladder()) == []


def test_the_report_shows_the_curves_and_says_how_the_best_moves(tmp_path: Path) -> None:
    tuned(-1.0).to_csv(tmp_path / "runs.csv", index=False)
    assert main([str(tmp_path / "runs.csv")]) == 0
    assert len(json.loads((tmp_path / "laws.json").read_text())["optima"]) == 2
    text = (tmp_path / "report/report.md").read_text()
    assert "The best lr for validation loss moves with width by the power" in text
    assert "## The best value of what was varied" in text and "width^-1.00" in text
    assert (tmp_path / "report/figures/val_loss-tuned.png").is_file()
    assert "width^-1.00" in (tmp_path / "report/index.html").read_text()
