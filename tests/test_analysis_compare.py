"""Arms against each other, allocation and isoFLOP profiles on truths that are known."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.allocation import allocation, cost_law, optimum
from analysis.compare import comparisons, contrast
from analysis.crossings import chance_of_best, crossing, draw
from analysis.fit import Fit, fit
from analysis.isoflop import budgets, parabola, profiles
from analysis.laws import law
from analysis.points import Points
from analysis.predictions import register
from analysis.rollout import rollout
from analysis.simulate import CHINCHILLA, chinchilla_points, grid
from analysis.study import Choice, default_laws, fit_one

N = np.geomspace(1e6, 1e9, 8)


def arm(name: str, floor: float, amplitude: float, exponent: float, seed: int = 0, unit: str = "nats") -> Points:
    y = (floor + amplitude * N**-exponent) * np.exp(0.002 * np.random.default_rng(seed).normal(size=8))
    p = chinchilla_points(N, np.full(8, 1e9), 0.0, np.random.default_rng(0))
    return replace(p, y=y, group={"arm": name}, units=np.full(8, unit))


def law_of(points: Points) -> Fit:
    return fit(law("power-floor"), points)


# two laws that meet: the steeper one starts higher
STEEP, SHALLOW = arm("steep", 1.0, 400.0, 0.38, 1), arm("shallow", 1.0, 20.0, 0.18, 2)
MEET = (400.0 / 20.0) ** (1 / 0.2)


def test_crossing_is_found_with_an_interval() -> None:
    found = crossing(law_of(STEEP), law_of(SHALLOW), 0.95, np.random.default_rng(0))
    assert found is not None and found["inside_data"] and found["share_of_draws"] > 0.95
    assert found["interval"][0] < MEET < found["interval"][1]
    assert found["at"] == pytest.approx(MEET, rel=0.3)


def test_parallel_arms_do_not_meet() -> None:
    found = crossing(law_of(arm("a", 1.0, 40.0, 0.3)), law_of(arm("b", 2.0, 80.0, 0.3)), 0.95, np.random.default_rng(0))
    assert found is not None and found["at"] is None and found["interval"] is None


def test_nearly_parallel_arms_have_no_interval_that_leaves_out_their_own_place() -> None:
    """They meet below the data in some draws and above it in others."""
    twins = [(law_of(arm("a", 1.0, 40.0, 0.3, k)), law_of(arm("b", 1.0, 40.0, 0.3, k + 50))) for k in range(12)]
    found = [crossing(a, b, 0.95, np.random.default_rng(0)) for a, b in twins]
    given = [c for c in found if c is not None and c["interval"] is not None]
    assert all(c["interval"][0] <= c["at"] <= c["interval"][1] for c in given)
    withheld = [c for c in found if c is not None and c["interval"] is None and c["share_of_draws"] > 0.5]
    assert given and withheld


def test_unlike_units_are_never_compared() -> None:
    other = arm("b", 1.0, 40.0, 0.3, unit="bits")
    assert contrast(STEEP, other, None, None, "all", 0.95) is None
    assert crossing(law_of(STEEP), law_of(other), 0.95, np.random.default_rng(0)) is None
    found = comparisons([STEEP, other], [law_of(STEEP), law_of(other)], 0.95)
    assert found == {"contrasts": [], "crossings": [], "chances": []}


def test_contrasts_have_the_right_sign_and_rows() -> None:
    a, b = law_of(STEEP), law_of(SHALLOW)
    small = contrast(STEEP, SHALLOW, a, b, "smallest", 0.95)
    large = contrast(STEEP, SHALLOW, a, b, "largest", 0.95)
    assert small is not None and large is not None
    assert (small.sign, large.sign) == (1, -1)
    assert small.rows == (0, 0) and large.rows == (7, 7)
    same = contrast(STEEP, arm("twin", 1.0, 400.0, 0.38, 9), a, a, "all", 0.95)
    assert same is not None and same.sign == 0 and same.pairs == 8


def test_the_best_arm_changes_with_size() -> None:
    chances = chance_of_best(
        [law_of(STEEP), law_of(SHALLOW)], np.array([MEET / 30, MEET * 30]), np.random.default_rng(0)
    )
    assert chances[0]["chance"]["shallow"] > 0.99 and chances[1]["chance"]["steep"] > 0.9
    assert sum(chances[0]["chance"].values()) == pytest.approx(1)


def test_draws_have_the_fits_covariance() -> None:
    fitted = law_of(STEEP)
    thetas = draw(fitted, 20000, np.random.default_rng(0))
    spread = np.sqrt(np.diag(fitted.covariance) * fitted.within[1] / (fitted.within[1] - 2))
    np.testing.assert_allclose(thetas.std(0), spread, rtol=0.15)


def test_optimum_is_where_no_neighbour_is_better() -> None:
    n, d = optimum(*(np.array([CHINCHILLA[k]]) for k in ("alpha", "beta", "A", "B")), k=6.0, p=1.1, budget=1e21)

    def loss(size: float) -> float:
        return 406.4 * size**-0.34 + 410.7 * (1e21 / (6 * size**1.1)) ** -0.28

    assert 6 * n[0] ** 1.1 * d[0] == pytest.approx(1e21)
    assert loss(n[0]) < min(loss(n[0] * 1.01), loss(n[0] / 1.01))


def test_allocation_covers_the_truth_and_counts_decades() -> None:
    points = chinchilla_points(*grid(8, 4), 0.002, np.random.default_rng(0))
    fitted = fit(law("chinchilla"), points)
    assert cost_law(fitted) == pytest.approx((6.0, 1.0))
    found = allocation(fitted, 0.95)
    assert found is not None
    last = found["budgets"][-1]
    assert last["decades"] == pytest.approx(1.0)
    true_n, true_d = optimum(*(np.array([CHINCHILLA[k]]) for k in ("alpha", "beta", "A", "B")), 6.0, 1.0, last["c"])
    assert last["n_interval"][0] < true_n[0] < last["n_interval"][1]
    assert last["d_interval"][0] < true_d[0] < last["d_interval"][1]
    assert allocation(law_of(STEEP), 0.95) is None


def test_neighbouring_budgets_are_not_merged() -> None:
    c = np.array([1e18, 1.004e18, 1.03e18, 1.06e18, 1e19])
    assert [len(s) for s in budgets(c)] == [2, 1, 1, 1]
    chain = 1e18 * 1.008 ** np.arange(8)
    assert max(np.ptp(np.log(chain[s])) for s in budgets(chain)) < 0.02


def test_isoflop_vertex_convexity_and_range() -> None:
    n = np.geomspace(1e7, 1e9, 7)
    bowl = np.exp(0.05 * np.log10(n / 1e8) ** 2)
    found = parabola(n, bowl * np.exp(1e-5 * np.random.default_rng(0).normal(size=7)), 0.95)
    assert found["n_star"] == pytest.approx(1e8, rel=0.01) and "code" not in found
    assert parabola(n, 1 / bowl, 0.95)["code"] == "NOT_CONVEX"
    assert parabola(n, np.exp(0.05 * np.log10(n / 1e11) ** 2), 0.95)["code"] == "OUTSIDE"
    assert parabola(n[:3], bowl[:3], 0.95)["code"] == "TOO_FEW_SIZES"


def test_profiles_of_an_isoflop_sweep_agree_with_the_joint_law() -> None:
    n = np.tile(np.geomspace(2e8, 6e9, 7), 3)
    c = np.repeat([1e20, 4e20, 1.6e21], 7)
    points = chinchilla_points(n, c / (6 * n), 0.0005, np.random.default_rng(0))
    joint = allocation(fit(law("chinchilla"), points), 0.95)
    found = profiles(points, 0.95, joint)
    assert [p["interpolated"] for p in found] == [False] * 3
    for p in found:
        assert np.log10(p["n_star"] / p["joint_n_star"]) == pytest.approx(0, abs=0.3)


def test_a_direction_that_the_data_hardly_hold_can_still_be_drawn() -> None:
    fitted = law_of(STEEP)
    axis = np.ones((len(fitted.theta), 1))
    # Of one direction alone, and by rounding a little less than positive.
    singular = replace(fitted, covariance=1e-6 * (axis @ axis.T) - 1e-20 * np.eye(len(axis)))
    drawn = draw(singular, 4000, np.random.default_rng(0)) - singular.theta
    assert np.allclose(drawn, drawn[:, :1], atol=1e-8) and 5e-4 < drawn[:, 0].std() < 3e-3


def variants(rng: np.random.Generator, spread: float) -> list[Points]:
    """Four settings of one arm that do not differ, at one size, two seeds each; evaluations err by .002."""
    alike = chinchilla_points(np.full(2, 1e6), np.full(2, 1e9), 0.0, rng)
    return [
        replace(
            alike,
            y=np.exp(spread * rng.normal(size=2) + 0.002 * rng.normal(size=2)),
            se=np.full(2, 0.002),
            seed=np.array(["0", "1"]),
            cluster=np.array([f"{k}-0", f"{k}-1"]),
            group={"token_kind": "discrete", "order": "random", "variant": str(k)},
        )
        for k in range(4)
    ]


@pytest.mark.parametrize("spread", [0.05, 0.002])
def test_without_a_law_other_seeds_are_in_the_interval_of_a_difference(spread: float) -> None:
    """At one size no law says what another seed would give: replicates pooled over the arm's variants do."""
    rng = np.random.default_rng(0)
    found = [c for _ in range(100) for c in comparisons(variants(rng, spread), [], 0.95)["contrasts"]]
    covered = np.mean([c["low"] <= 0 <= c["high"] for c in found])
    assert len(found) == 600 and 0.92 < covered < 0.985


def test_an_arm_without_a_law_or_a_replicate_is_as_noisy_as_the_other() -> None:
    apart = 0
    for k in range(100):
        whole, part = (arm(name, 1.0, 20.0, 0.18, seed) for name, seed in (("whole", 2 * k), ("part", 2 * k + 1)))
        found = contrast(whole, part.take(np.arange(8) < 3), law_of(whole), None, "largest", 0.95)
        assert found is not None
        apart += not found.low <= 0 <= found.high
    assert apart <= 11


def test_two_settings_with_two_seeds_each_are_enough_to_be_honest() -> None:
    """Two degrees of freedom make a wide interval, not none: the images' error alone would be ten times too narrow."""
    rng = np.random.default_rng(0)
    found = [comparisons(variants(rng, 0.05)[:2], [], 0.95)["contrasts"] for _ in range(400)]
    assert 0.92 < np.mean([c["low"] <= 0 <= c["high"] for (c,) in found]) < 0.975


def test_only_equal_data_sizes_are_compared() -> None:
    """A ladder half way through has its largest data in one arm only: what both have is compared."""
    d = np.array([1e9, 2e9, 1e9, 2e9])
    whole = chinchilla_points(np.array([1e6, 1e6, 1e7, 1e7]), d, 0.0, np.random.default_rng(0))
    begun = replace(whole.take(np.arange(3)), group={"arm": "begun"}, y=whole.y[:3] * 1.1)
    found = contrast(replace(whole, se=whole.y * 0.01), replace(begun, se=begun.y * 0.01), None, None, "largest", 0.95)
    assert found is not None and found.rows == (2, 2) and found.effect == pytest.approx(-np.log(1.1))
    other = replace(begun, d=begun.d * 3, se=begun.y * 0.01)
    assert contrast(replace(whole, se=whole.y * 0.01), other, None, None, "largest", 0.95) is None


def test_arms_whose_data_grow_with_their_models_are_paired_size_by_size() -> None:
    """Tokens at twenty a parameter: arms of slightly different parameters have no data size in common."""
    n = np.array([1e6, 1e7, 1e8])
    a = chinchilla_points(n, 20 * n, 0.0, np.random.default_rng(0))
    a = replace(a, se=a.y * 0.01)
    found = contrast(a, replace(a, n=a.n * 1.02, d=a.d * 1.02, y=a.y * 1.1), None, None, "largest", 0.95)
    assert found is not None and found.effect == pytest.approx(-np.log(1.1)) and found.rows == (2, 2)


def family(name: str, sizes: list[float], names: str = "") -> Points:
    """Models of one law at one data size; `names` has a letter for each size."""
    rng = np.random.default_rng(0)
    points = chinchilla_points(np.array(sizes), np.full(len(sizes), 3e11), 0.0, rng)
    return replace(points, se=points.y * 0.001, group={"family": name}, sizes=dict(enumerate(names)))


def test_families_of_unlike_sizes_are_compared_at_those_that_both_have() -> None:
    """The third size of one is no counterpart of the third of another that is ten times as large."""
    a, b = family("a", [1e7, 3e7, 1e8, 3e8]), family("b", [1.04e8, 3.1e8, 1e9, 3e9])
    found = comparisons([a, b], [], 0.95)["contrasts"]
    assert [(c["at"], c["rows"]) for c in found] == [("smallest", (2, 0)), ("largest", (3, 1))]
    assert all(abs(c["effect"]) < 0.01 for c in found)
    assert [c["at"] for c in comparisons([a, b.take(np.array([0, 3]))], [], 0.95)["contrasts"]] == ["largest"]
    assert contrast(a, family("c", [1e9, 3e9]), None, None, "largest", 0.95) is None


def test_sizes_go_by_their_names_where_both_arms_have_them() -> None:
    a, b = family("a", [1e7, 3e7, 1e8], "SML"), family("b", [1.9e7, 5e7], "SM")
    found = contrast(a, b, None, None, "largest", 0.95)
    assert found is not None and found.rows == (1, 1)
    unnamed = contrast(a, replace(b, sizes={}), None, None, "largest", 0.95)
    one_name = contrast(a, replace(b, sizes={0: "S", 1: "S"}), None, None, "largest", 0.95)
    assert unnamed is None and one_name is None, "a name that stands for several sizes tells none"


def test_the_order_of_two_arms_does_not_change_their_interval() -> None:
    """Each arm brings the noise of its own seeds."""
    rng = np.random.default_rng(0)
    calm, wild = variants(rng, 0.01), variants(rng, 0.1)
    wild = [replace(p, group={**p.group, "token_kind": "continuous"}) for p in wild]
    there = [c for c in comparisons([*calm, *wild], [], 0.95)["contrasts"] if c["a"][:8] == "discrete" != c["b"][:8]]
    back = {(c["a"], c["b"]): c for c in comparisons([*wild, *calm], [], 0.95)["contrasts"]}
    assert len(there) == 16
    for c in there:
        turned = back[c["b"], c["a"]]
        assert (turned["low"], turned["high"]) == pytest.approx((-c["high"], -c["low"]))


def one_size(name: str, floor: float, amplitude: float, exponent: float, seed: int) -> Points:
    d = np.geomspace(1e5, 1e8, 7)
    points = chinchilla_points(np.full(7, 1e6), d, 0.0, np.random.default_rng(0))
    y = (floor + amplitude * d**-exponent) * np.exp(0.002 * np.random.default_rng(seed).normal(size=7))
    return replace(points, y=y, se=0.002 * y, group={"arm": name}, units=np.full(7, "nats"))


def test_one_model_on_several_data_sizes_has_laws_and_a_crossing_along_data() -> None:
    arms = one_size("steep", 1.0, 2000.0, 0.6, 1), one_size("shallow", 1.0, 20.0, 0.25, 2)
    meet = 100.0 ** (1 / 0.35)
    assert all(p.is_data_ladder and p.rung_axis == "d" and len(p.ladder()) == 7 for p in arms)
    fits = [fit_one(chosen, p, Choice()) for p in arms for chosen in default_laws(p)]
    assert [f.law.axes for f in fits] == [("d",), ("d",)]
    found = comparisons(arms, fits, 0.95)
    (where,) = found["crossings"]
    assert where["axis"] == "d" and where["inside_data"] and where["at"] == pytest.approx(meet, rel=0.2)
    assert where["interval"][0] < meet < where["interval"][1]
    assert [c["at"] for c in found["contrasts"]] == ["largest"] and found["contrasts"][0]["sign"] == -1
    # Held out in turn, each larger data size is asked of the smaller ones.
    entries = rollout(arms[0], lambda points: fit_one(law("power-floor", "d"), points, Choice()), 0.95)
    assert [e["held_out"]["d"] for e in entries][-1] == 1e8 and entries[-1]["relative_error"] == pytest.approx(
        0, abs=0.05
    )
    (said,) = register(arms[0], lambda points: fit_one(law("power-floor", "d"), points, Choice()), 0.95)
    assert said["target"]["d"] == 1e8 and said["n_rows"] == 6
    assert not register(arms[0].take(np.array([0])), lambda points: fits[0], 0.95)
    assert [w.code for f in fits for w in f.warnings if w.code == "FEW_TRUNKS"] == []
    one_trunk = fit_one(law("power-floor", "d"), replace(arms[0], cluster=np.zeros(7, int)), Choice())
    assert "FEW_TRUNKS" in [w.code for w in one_trunk.warnings] and not one_trunk.headline


def test_likelihoods_of_two_orders_may_meet_though_each_has_a_protocol_of_its_own() -> None:
    arms = []
    for order, points in zip(
        ("random", "raster"), (one_size("a", 1.0, 2000.0, 0.6, 1), one_size("b", 1.0, 20.0, 0.25, 2)), strict=True
    ):
        group = {"token_kind": "discrete", "order": order}
        arms.append(replace(points, kind="signed", metric="val_nll", group=group, protocols=np.full(7, f"nll-{order}")))
    fits = [fit_one(chosen, p, Choice()) for p in arms for chosen in default_laws(p)]
    (where,) = comparisons(arms, fits, 0.95)["crossings"]
    assert where["at"] == pytest.approx(100.0 ** (1 / 0.35), rel=0.3)
    other = replace(arms[1], group={"token_kind": "continuous", "order": "raster"})
    fits = [fit_one(chosen, p, Choice()) for p in (arms[0], other) for chosen in default_laws(p)]
    assert not comparisons([arms[0], other], fits, 0.95)["crossings"]


def test_a_ladder_is_taken_at_the_largest_data_that_all_its_sizes_have() -> None:
    n, d = np.array([1e6, 1e6, 1e7, 1e7, 1e8]), np.array([1e9, 2e9, 1e9, 2e9, 1e9])
    points = chinchilla_points(n, d, 0.0, np.random.default_rng(0))
    assert points.largest_data().d.tolist() == [1e9] * 3
    assert points.take(np.arange(4)).largest_data().d.tolist() == [2e9] * 2
    # Data that grow with the model have no size in common.
    assert replace(points, d=n * 20).largest_data().n.tolist() == n.tolist()
