"""Intervals: coverage in simulation, agreement of independent methods, honest extrapolation."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.bootstrap import intervals
from analysis.fit import fit
from analysis.intervals import allocation_exponent, parameter_intervals, predict
from analysis.laws import law
from analysis.noise import lack_of_fit, pooled, seed_noise
from analysis.simulate import CHINCHILLA, chinchilla_points, grid
from analysis.solver import Objective
from analysis.table import InvalidTable


@pytest.mark.parametrize("ratios", [2, 4])
def test_nominal_95_percent_covers(ratios: int) -> None:
    """A quick version of benchmarks/coverage.py: 60 tables, so a bound three standard errors wide."""
    rng, t = np.random.default_rng(11), CHINCHILLA
    n, d = grid(6, ratios)
    far_n, far_d = n.max() * 10**0.5, d.max() * 10**0.5
    truth = t["E"] + t["A"] * far_n ** -t["alpha"] + t["B"] * far_d ** -t["beta"]
    hits = []
    for _ in range(60):
        fitted = fit(law("chinchilla"), chinchilla_points(n, d, 0.003, rng), thorough=False)
        found, share = parameter_intervals(fitted), allocation_exponent(fitted)
        said = predict(fitted, n=far_n, d=far_d)
        assert share is not None
        hits.append([
            found["alpha"][0] <= t["alpha"] <= found["alpha"][1], found["beta"][0] <= t["beta"] <= found["beta"][1],
            share[1] <= t["beta"] / (t["alpha"] + t["beta"]) <= share[2], said.low <= truth <= said.high,
        ])  # fmt: skip
    cover = np.mean(hits, axis=0)
    assert (cover >= 0.95 - 3 * 0.028).all(), cover


def test_methods_agree_where_they_should() -> None:
    p = chinchilla_points(*grid(8, 4), 0.003, np.random.default_rng(2))
    fitted = fit(law("chinchilla"), p, Objective("lse-log"))
    widths = {
        m: np.subtract(*intervals(fitted, m)["alpha"][::-1]) for m in ("gauss-newton-t", "profile-F", "wild-cluster")
    }
    assert widths["profile-F"] == pytest.approx(widths["gauss-newton-t"], rel=0.05)
    assert widths["wild-cluster"] == pytest.approx(widths["gauss-newton-t"], rel=0.25)
    assert intervals(fitted, "pairs-cluster") == intervals(fitted, "pairs-cluster")


def test_profile_needs_squares() -> None:
    fitted = fit(law("chinchilla"), chinchilla_points(*grid(6, 4), 0.003, np.random.default_rng(2)))
    with pytest.raises(InvalidTable, match="PROFILE_NEEDS_SQUARES"):
        intervals(fitted, "profile-F")


def test_a_new_run_is_wider_than_the_law_and_says_how_far_it_is() -> None:
    fitted = fit(law("power-floor"), chinchilla_points(*grid(8, 2), 0.003, np.random.default_rng(2)).largest_data())
    inside, beyond = predict(fitted, n=1e9), predict(fitted, n=1e12)
    assert inside.decades == 0 and beyond.decades == pytest.approx(2.0)
    assert inside.run_low < inside.low < inside.mean < inside.high < inside.run_high
    assert beyond.high / beyond.low > inside.high / inside.low


def test_score_bands_stay_inside_their_bounds() -> None:
    n, d = grid(5, 2)
    p = chinchilla_points(n, d, 0.0, np.random.default_rng(0))
    y = np.clip(1 / (1 + np.exp(-0.7 * np.log(n / 1e9))) + 0.05 * np.random.default_rng(1).normal(size=len(n)), 0, 1)
    fitted = fit(law("logit", "n"), replace(p, y=y, kind="score", se=np.full(len(n), 0.02)))
    said = predict(fitted, n=1e13)
    assert 0 < said.run_low < said.low < said.mean < said.high < said.run_high < 1


def test_seed_noise_is_measured_from_replicates_only() -> None:
    n, d = grid(4, 1)
    n, d = np.tile(n, 3), np.tile(d, 3)
    p = chinchilla_points(n, d, 0.01, np.random.default_rng(3))
    found = seed_noise(p)
    assert found is not None and found.dof == 8 and 0.004 < found.relative < 0.02
    assert seed_noise(p.take(np.arange(4))) is None
    both = pooled([found, found])
    assert both is not None and both.dof == 16 and both.variance == pytest.approx(found.variance)
    assert pooled([]) is None


def test_lack_of_fit_is_seen_where_replicates_allow() -> None:
    n = np.repeat(np.geomspace(1e6, 1e9, 8), 2)
    rng = np.random.default_rng(0)
    p = chinchilla_points(n, np.full(16, 1e10), 0.001, rng)
    wiggly = replace(p, y=p.y * (1 + 0.03 * np.sin(2.5 * np.log(n))))
    good, bad = fit(law("power-floor"), p), fit(law("power-floor"), wiggly)
    assert lack_of_fit(good, seed_noise(p)) == []
    assert [w.code for w in lack_of_fit(bad, seed_noise(wiggly))] == ["LACK_OF_FIT"]
