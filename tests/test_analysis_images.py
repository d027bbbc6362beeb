"""Losses image by image beside the table: errors of differences, in weights and between arms."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.compare import contrast
from analysis.fit import fit, weights_of
from analysis.images import FILE, aligned, beside, paired_error, paired_errors
from analysis.laws import law
from analysis.points import Points, select
from analysis.simulate import chinchilla_points
from analysis.solver import Objective
from analysis.table import InvalidTable, prepare

IMAGES, HARD, OWN = 400, 0.5, 0.03


def seen(means: np.ndarray, rng: np.random.Generator, hard: np.ndarray, own: float = OWN) -> np.ndarray:
    """(runs, images): each run's mean times how hard an image is for all, and noise of its own."""
    return means[:, None] * hard * np.exp(own * rng.normal(size=(len(means), len(hard))))


def ladder(name: str, lift: float, rng: np.random.Generator, hard: np.ndarray, own: float = OWN) -> Points:
    n = np.geomspace(1e6, 1e9, 6)
    p = chinchilla_points(n, np.full(6, 1e9), 0.0, rng)
    values = seen(p.y * np.exp(lift), rng, hard, own)
    return replace(
        p, y=values.mean(1), se=values.std(1, ddof=1) / np.sqrt(IMAGES), group={"arm": name},
        images=dict(enumerate(values)),
    )  # fmt: skip


def hardness(rng: np.random.Generator) -> np.ndarray:
    return np.exp(HARD * rng.normal(size=IMAGES))


def test_the_paired_error_is_the_spread_over_sets_of_images() -> None:
    """Of a run's mean beside its ladder's, over other images; the plain error is many times that."""
    rng, means, found, plain, spread = np.random.default_rng(0), np.ones(6), [], [], []
    for _ in range(200):
        values = seen(means, rng, hardness(rng))
        found.append(paired_errors(values))
        plain.append(values.std(1, ddof=1) / np.sqrt(IMAGES))
        spread.append(values.mean(1) - values.mean())
    # a run's distance from the mean of six holds 5/6 of its own variance
    assert np.mean(found) == pytest.approx(np.std(spread) * np.sqrt(6 / 5), rel=0.1)
    assert np.mean(plain) > 10 * np.mean(found)
    assert paired_errors(values[:1]) is None and aligned([values[0], values[1][:5]], False) is None


def test_weights_follow_the_paired_error() -> None:
    """One run whose own noise is large counts less, though its plain error is that of the others."""
    rng = np.random.default_rng(0)
    p, own = ladder("a", 0.0, rng, hard := hardness(rng)), np.full(6, OWN)
    own[2] = 0.4
    values = np.stack([seen(p.y[i : i + 1], rng, hard, own[i])[0] for i in range(6)])
    with_images = replace(p, images=dict(enumerate(values)))
    weights = weights_of(with_images, Objective())
    assert weights[2] < 0.1 * np.delete(weights, 2).min()
    without = weights_of(replace(p, images={}), Objective())
    assert without.max() / without.min() < 1.5
    partly = replace(p, images={0: values[0]})
    np.testing.assert_array_equal(partly.error, p.se)


def test_a_contrast_over_common_images_covers_and_says_so() -> None:
    rng, held = np.random.default_rng(1), []
    for _ in range(150):
        hard = hardness(rng)
        a, b = ladder("a", 0.01, rng, hard), ladder("b", 0.0, rng, hard)
        found = contrast(a, b, None, None, "largest", 0.95)
        assert found is not None and found.paired_by == ("seeds", "images") and found.error_unpaired is not None
        assert found.error < 0.2 * found.error_unpaired
        held.append(found.low < 0.01 < found.high)
    assert np.mean(held) >= 0.95 - 3 * 0.018
    values = aligned([a.images[5], b.images[5]], True)
    assert values is not None and found.error == pytest.approx(paired_error(values[:1], values[1:]))


def test_the_scatter_around_a_law_is_not_paired_away() -> None:
    rng = np.random.default_rng(2)
    hard = hardness(rng)
    noisy = [ladder(name, 0.0, rng, hard) for name in "ab"]
    noisy = [replace(p, y=p.y * np.exp(0.05 * rng.normal(size=6))) for p in noisy]
    laws = [fit(law("power-floor"), p, thorough=False) for p in noisy]
    found = contrast(*noisy, *laws, "largest", 0.95)
    assert found is not None and found.error >= np.sqrt(sum(f.within[0] for f in laws)) * 0.999


def test_the_file_beside_a_table_reaches_the_points(tmp_path: Path) -> None:
    rows = [("r1", "val_loss", [1.0, 2.0, 3.0]), ("r2", "val_loss", [1.5, 2.5, 3.5])]
    pd.DataFrame(rows, columns=["run_id", "metric", "values"]).to_parquet(tmp_path / FILE)
    table = pd.DataFrame({"run_id": ["r1", "r2"], "params_total": [1e6, 2e6], "images": 5, "val_loss": [2.0, 2.5]})
    prepared = replace(prepare(table.assign(val_loss_se=0.5), "", "frame"), images=beside(tmp_path / "runs.csv"))
    points, _ = select(prepared, {}, prepared.frame, "val_loss")
    assert list(points.images[1]) == [1.5, 2.5, 3.5] and (points.error < 0.2).all()
    assert beside(tmp_path / "elsewhere" / "runs.csv") == {}
    (tmp_path / FILE).write_text("no parquet")
    with pytest.raises(InvalidTable, match="UNREADABLE_IMAGES"):
        beside(tmp_path / "runs.csv")
