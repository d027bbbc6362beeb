"""Intervals: coverage in simulation, agreement of independent methods, honest extrapolation."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.bootstrap import intervals
from analysis.fit import fit
from analysis.intervals import allocation_exponent, parameter_intervals, predict
from analysis.laws import law
from analysis.noise import lack_of_fit, of_form, pooled, replicated, seed_noise, seed_variance, unlike
from analysis.points import Points
from analysis.simulate import CHINCHILLA, chinchilla_points, grid, trunk_points
from analysis.solver import Objective
from analysis.table import InvalidTable
from analysis.variances import NO_SEEDS


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


def branches(trunks: int, rows: int, rng: np.random.Generator) -> Points:
    """A power law along C alone, each trunk with a stretch of C and an error three times that of its rows."""
    c, trunk = np.geomspace(1e18, 1e22, trunks * rows), np.repeat(np.arange(trunks), rows)
    blank = np.full(len(c), np.nan)
    y = 1e3 * c**-0.1 * np.exp(0.01 * rng.normal(size=trunks)[trunk] + 0.003 * rng.normal(size=len(c)))
    return replace(chinchilla_points(c, c, 0.0, rng), y=y, c=c, n=blank, d=blank, cluster=trunk)


def test_branches_of_six_trunks_along_one_axis_keep_coverage() -> None:
    """Taken as 24 independent rows they covered .65."""
    rng, hits = np.random.default_rng(2), []
    for _ in range(60):
        fitted = fit(law("power", "c"), branches(6, 4, rng), thorough=False)
        low, high = parameter_intervals(fitted)["alpha"]
        hits.append(low <= 0.1 <= high)
    assert np.mean(hits) >= 0.95 - 3 * 0.028 and fitted.between[1] == 4 and fitted.headline


def test_each_of_five_trunks_along_a_whole_axis_tells_all_but_the_level() -> None:
    rng, hits = np.random.default_rng(3), []
    d, trunk = np.tile(np.geomspace(1e5, 1e8, 7), 5), np.repeat(np.arange(5), 7)
    base = chinchilla_points(np.full(35, 1e6), d, 0.0, rng)
    for _ in range(60):
        y = (1 + 2000 * d**-0.6) * np.exp(0.01 * rng.normal(size=5)[trunk] + 0.003 * rng.normal(size=35))
        fitted = fit(law("power-floor", "d"), replace(base, y=y, cluster=trunk), thorough=False)
        found = parameter_intervals(fitted)
        hits.append([found["alpha"][0] <= 0.6 <= found["alpha"][1], found["E"][0] <= 1 <= found["E"][1]])
    assert (np.mean(hits, axis=0) >= 0.95 - 3 * 0.028).all() and fitted.between[1] == 4


def test_too_few_trunks_are_no_headline_unless_replicates_tell_of_them() -> None:
    """3 trunks for 3 parameters that only trunks tell apart: taken as independent rows, alpha covered .73."""
    rng = np.random.default_rng(0)
    three, known = trunk_points(3, 6, 1, 0.003, rng), seed_variance([trunk_points(6, 4, 2, 0.003, rng)])
    alone, told = (fit(law("chinchilla"), three, thorough=False, seeds=s) for s in (NO_SEEDS, known))
    assert "FEW_TRUNKS" in {w.code for w in alone.warnings} and not alone.headline
    assert "FEW_TRUNKS" not in {w.code for w in told.warnings} and told.between == (known.between, known.dof)
    two = fit(law("power", "c"), branches(2, 6, rng), thorough=False)
    assert "FEW_TRUNKS" in {w.code for w in two.warnings} and not two.headline


def test_methods_that_take_rows_as_independent_or_need_many_trunks_are_refused() -> None:
    shared = fit(law("chinchilla"), trunk_points(6, 4, 1, 0.003, np.random.default_rng(0)), Objective("lse-log"))
    with pytest.raises(InvalidTable, match=r"SHARED_TRUNKS.*profile-F"):
        intervals(shared, "profile-F")
    for method in ("wild-cluster", "pairs-cluster"):
        with pytest.raises(InvalidTable, match=rf"FEW_TRUNKS.*6 trunks.*{method}"):
            intervals(shared, method)
    many = fit(law("chinchilla"), trunk_points(10, 2, 1, 0.003, np.random.default_rng(0)), Objective("lse-log"))
    low, high = intervals(many, "pairs-cluster", draws=50)["alpha"]
    assert low < high


def test_methods_agree_where_they_should() -> None:
    p = chinchilla_points(*grid(8, 4), 0.003, np.random.default_rng(2))
    fitted = fit(law("chinchilla"), p, Objective("lse-log"))
    widths = {
        m: np.subtract(*intervals(fitted, m)["alpha"][::-1]) for m in ("gauss-newton-t", "profile-F", "wild-cluster")
    }
    assert widths["profile-F"] == pytest.approx(widths["gauss-newton-t"], rel=0.05)
    assert widths["wild-cluster"] == pytest.approx(widths["gauss-newton-t"], rel=0.25)
    assert intervals(fitted, "pairs-cluster") == intervals(fitted, "pairs-cluster")


@pytest.mark.parametrize("method", ["profile-F", "wild-cluster"])
def test_what_rests_on_squares_is_refused_under_a_robust_objective(method: str) -> None:
    fitted = fit(law("chinchilla"), chinchilla_points(*grid(6, 4), 0.003, np.random.default_rng(2)))
    with pytest.raises(InvalidTable, match=f"NEEDS_SQUARES.*{method}"):
        intervals(fitted, method)


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


def test_a_score_far_from_three_noisy_points_is_anything_without_a_warning() -> None:
    n, d = grid(3, 1)
    p = chinchilla_points(n, d, 0.0, np.random.default_rng(0))
    y = np.clip(0.5 + 0.3 * np.random.default_rng(2).normal(size=3), 0.01, 0.99)
    fitted = fit(law("logit", "n"), replace(p, y=y, kind="score", se=np.full(3, 0.02)))
    with np.errstate(over="raise"):
        said = predict(fitted, n=1e40)
    assert 0 <= said.low < 1e-9 and 1 - 1e-9 < said.high <= 1


def test_a_score_whose_law_is_a_step_is_not_known_beyond_it() -> None:
    n, d = grid(5, 1)
    y = np.array([0.0, 0.0, 0.01, 0.95, 1.0])
    points = replace(chinchilla_points(n, d, 0.0, np.random.default_rng(0)), y=y, kind="score", se=np.full(5, 0.02))
    fitted = fit(law("logit", "n"), points)
    with np.errstate(all="raise", under="ignore"):
        said = predict(fitted, n=float(n[-1]) * 1e9)
    assert said.mean == 1 and 0 <= said.low < 1e-9 and 1 - 1e-9 < said.high <= 1


def test_seed_noise_is_measured_from_replicates_only() -> None:
    n, d = grid(4, 1)
    n, d = np.tile(n, 3), np.tile(d, 3)
    p = replace(chinchilla_points(n, d, 0.01, np.random.default_rng(3)), seed=np.repeat(list("012"), 4))
    found = seed_noise(p)
    assert found is not None and found.dof == 8 and 0.004 < found.relative < 0.02
    assert seed_noise(p.take(np.arange(4))) is None
    # runs of one seed at one size differ in something else, a learning rate say: no replicates
    assert seed_noise(replace(p, seed=np.full(12, "0"))) is None
    assert seed_variance([replace(p, seed=np.full(12, "0"))]) == NO_SEEDS != seed_variance([p])
    both = pooled([found, found])
    assert both is not None and both.dof == 16 and both.variance == pytest.approx(found.variance)
    assert pooled([]) is None


def test_seed_noise_counts_trunks_and_not_their_branches() -> None:
    """Five sizes, three data sizes a trunk, two seeds: five comparisons, and lone trunks add none."""
    p = trunk_points(5, 3, 2, 0.005, np.random.default_rng(1))
    found, own = seed_noise(p), seed_variance([p])
    assert found is not None and found.dof == own.dof == 5
    assert found.variance == pytest.approx(2 * 0.005**2, rel=0.9)
    some = seed_noise(p.take((p.seed == "0") | (p.n < p.n.max())))
    assert some is not None and some.dof == 4


def seeded(spread: float, seeds: int, unit: str, name: str, rng: np.random.Generator) -> Points:
    n = np.tile(np.geomspace(1e6, 1e9, 5), seeds)
    p = chinchilla_points(n, np.full(len(n), 1e10), spread, rng)
    labels = np.repeat(np.arange(seeds).astype(str), 5)
    return replace(p, seed=labels, units=np.full(len(n), unit), group={"arm": name})


def test_a_law_is_held_to_seeds_of_its_own_unit_and_of_its_own_arm_where_arms_are_unlike() -> None:
    rng = np.random.default_rng(0)
    even = [seeded(0.01, 3, "nats", name, rng) for name in "ab"]
    other, loud = seeded(0.001, 3, "bits", "c", rng), seeded(0.1, 3, "nats", "loud", rng)

    def dof(points: list[Points]) -> dict[str, int]:
        return {name: noise.dof for (_, name), noise in of_form(points).items() if noise}

    assert dof([*even, other]) == {"a": 20, "b": 20, "c": 10}
    assert dof([*even, loud]) == {"a": 10, "b": 10, "loud": 10}
    assert unlike([n for n in map(seed_noise, even) if n]) is None
    ends = unlike([n for n in map(seed_noise, [*even, loud]) if n])
    assert ends is not None and ends[1].group == "loud"


def test_where_arms_are_unlike_a_law_rests_on_its_own_arms_seeds() -> None:
    rng, blamed = np.random.default_rng(1), 0
    for _ in range(20):
        quiet, loud = (seeded(spread, 4, "nats", name, rng) for spread, name in ((0.002, "quiet"), (0.02, "loud")))
        found, held = replicated([quiet, loud]), of_form([quiet, loud])
        own = found[quiet.metric, quiet.kind, "quiet"]
        assert 0.001 < own.total**0.5 < 0.004 < found[loud.metric, loud.kind, "loud"].total ** 0.5
        blamed += bool(lack_of_fit(fit(law("power-floor"), quiet, seeds=own), held[quiet.metric, "quiet"]))
    assert blamed <= 1


@pytest.mark.parametrize("seeds, others", [(2, 0), (1, 2)])
def test_seed_replicates_keep_coverage(seeds: int, others: int) -> None:
    """A quick version of benchmarks/coverage.py: seeds of the arm itself, and seeds that other arms alone have."""
    rng, hits = np.random.default_rng(3), []
    for _ in range(40):
        p = trunk_points(6, 4, seeds, 0.003, rng)
        found = seed_variance([p, *(trunk_points(6, 4, 2, 0.003, rng) for _ in range(others))])
        fitted = fit(law("chinchilla"), p, thorough=False, seeds=found)
        low, high = parameter_intervals(fitted)["alpha"]
        said, truth = predict(fitted, n=1e10, d=4e11), 1.69 + 406.4 * 1e10**-0.34 + 410.7 * 4e11**-0.28
        new = truth * np.exp(0.003 * 2**0.5 * rng.normal())
        hits.append([low <= 0.34 <= high, said.low <= truth <= said.high, said.run_low <= new <= said.run_high])
    assert (np.mean(hits, axis=0) >= 0.95 - 3 * 0.034).all()


def test_seed_variance_tells_a_trunk_from_its_runs() -> None:
    rng = np.random.default_rng(0)
    found = seed_variance([trunk_points(8, 4, 4, 0.01, rng) for _ in range(6)])
    assert found.within == pytest.approx(1e-4, rel=0.15) and found.between == pytest.approx(1e-4, rel=0.3)
    assert found.dof == 6 * 8 * 3
    assert seed_variance([trunk_points(8, 4, 1, 0.01, rng)]) == NO_SEEDS
    # one replicated size alone has too few degrees of freedom to overrule the residuals
    few = trunk_points(8, 4, 3, 0.01, rng)
    assert seed_variance([few.take(few.n == few.n.min())]) == NO_SEEDS


def test_seed_variance_is_the_least_that_an_interval_rests_on() -> None:
    lucky = trunk_points(6, 4, 1, 1e-6, np.random.default_rng(1))
    noisy = seed_variance([trunk_points(6, 4, 3, 0.01, np.random.default_rng(2))])
    without, given = (fit(law("chinchilla"), lucky, thorough=False, seeds=s) for s in (NO_SEEDS, noisy))
    assert given.within[0] == noisy.within and given.between[0] == noisy.between
    assert given.theta == pytest.approx(without.theta)
    said = predict(given, n=1e9, d=2e10)
    assert np.log(said.run_high / said.mean) > 1.9 * np.sqrt(noisy.total)


def test_seed_variance_of_a_score_is_in_units_of_its_own_error() -> None:
    rng = np.random.default_rng(0)
    n, d = np.tile(np.geomspace(1e6, 1e9, 8), 4), np.full(32, 1e9)
    share = 1 / (1 + np.exp(-0.5 * np.log(n / 3e7)))
    p = replace(chinchilla_points(n, d, 0.0, rng), kind="score", se=np.full(32, 0.02), seed=np.repeat(list("0123"), 8))
    found = seed_variance([replace(p, y=share + 0.03 * rng.normal(size=32))])
    assert found.total == pytest.approx(1.5**2, rel=0.5)


def test_lack_of_fit_is_seen_where_replicates_allow() -> None:
    n = np.repeat(np.geomspace(1e6, 1e9, 8), 2)
    rng = np.random.default_rng(0)
    p = replace(chinchilla_points(n, np.full(16, 1e10), 0.001, rng), seed=np.tile(["0", "1"], 8))
    wiggly = replace(p, y=p.y * (1 + 0.03 * np.sin(2.5 * np.log(n))))
    good, bad = fit(law("power-floor"), p), fit(law("power-floor"), wiggly)
    assert lack_of_fit(good, seed_noise(p)) == []
    assert [w.code for w in lack_of_fit(bad, seed_noise(wiggly))] == ["LACK_OF_FIT"]
