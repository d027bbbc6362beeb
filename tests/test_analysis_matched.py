"""Arms at equal images, parameters and compute, on truths in which the three answers differ."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.compare import comparisons
from analysis.fit import Fit
from analysis.laws import law
from analysis.matched import matched
from analysis.points import Points
from analysis.simulate import chinchilla_points
from analysis.study import Choice, fit_one

RUNGS = np.geomspace(1e6, 1e8, 7)


def arm(name: str, heavier: float, dearer: float, seed: int, floor: float = 1.0) -> Points:
    """A distance `floor` + 300 N^-.3 on seven rungs; `heavier` in parameters a rung, `dearer` in FLOPs a parameter."""
    rng = np.random.default_rng(seed)
    n = RUNGS * heavier
    y = (floor + 300 * n**-0.3) * np.exp(0.01 * rng.normal(size=7))
    points = chinchilla_points(n, np.full(7, 1e9), 0.0, rng)
    return replace(points, metric="fd", kind="distance", y=y, se=0.01 * y, c=6 * n * 1e9 * dearer,
                   group={"arm": name}, floor=floor, units=np.full(7, "FD"),
                   sizes={k: f"rung {k}" for k in range(7)})  # fmt: skip


def laws_of(*points: Points) -> list[Fit]:
    return [
        fit_one(law(name, axis), p, Choice()) for p in points for name, axis in (("power-floor", "n"), ("compute", "c"))
    ]


def matched_of(points: tuple[Points, ...], fits: list[Fit]) -> list[dict]:
    return matched(points, fits, comparisons(points, fits, 0.95)["contrasts"], 0.95)


def rows_of(*points: Points) -> dict[str, dict]:
    return {row["matched"]: row for row in matched_of(points, laws_of(*points))}


def test_a_heavier_and_dearer_arm_is_ahead_a_rung_level_in_parameters_and_behind_in_compute() -> None:
    found = rows_of(arm("light", 1, 1, 1), arm("heavy", 1.5, 3, 2))
    assert list(found) == ["images", "parameters", "training FLOPs"]
    assert found["images"]["effect"][1] > 0
    low, high = found["parameters"]["effect"][1:]
    assert low < 0 < high
    assert found["training FLOPs"]["effect"][2] < 0
    assert found["parameters"]["at"] == RUNGS[-1] and found["training FLOPs"]["at"] == 6e17
    assert found["images"]["at"] == 1e9


def test_at_equal_parameters_the_interval_covers_no_difference() -> None:
    def effect(seed: int) -> list[float]:
        arms = arm("a", 1, 1, seed), arm("b", 1.5, 3, seed + 1)
        along_n = [fit_one(law("power-floor", "n"), points, Choice()) for points in arms]
        (found,) = (row["effect"] for row in matched_of(arms, along_n) if row["matched"] == "parameters")
        return found

    zero = [effect(2 * k) for k in range(60)]
    assert np.mean([low <= 0 <= high for _, low, high in zero]) > 0.87
    assert np.mean([high - low for _, low, high in zero]) < 0.1


def test_net_of_their_floors_arms_that_differ_in_tokens_alone_are_alike() -> None:
    for row in rows_of(arm("coarse", 1, 1, 1, floor=2.0), arm("fine", 1, 1, 2, floor=1.0)).values():
        assert row["effect"][1] > 0
        assert row["net_effect"][1] < 0 < row["net_effect"][2]


def test_a_score_is_taken_as_a_share_of_its_ceiling() -> None:
    coarse = arm("coarse", 1, 1, 1)
    scores = {"metric": "geneval", "kind": "score", "floor": None, "units": np.full(7, "fraction")}
    share = 1 / (1 + (3e7 / RUNGS) ** 0.5)
    coarse = replace(coarse, **scores, y=0.8 * share, se=np.full(7, 0.01), ceiling=0.8)
    fine = replace(coarse, y=share, ceiling=1.0, group={"arm": "fine"})
    (row,) = matched_of((coarse, fine), [])
    assert row["effect"][2] < 0 and row["net_effect"][0] == pytest.approx(0, abs=1e-9)
    assert row["net_effect"][2] == pytest.approx((row["effect"][2] - row["effect"][0]) / 0.8)


def test_a_value_at_its_floor_has_no_net_difference() -> None:
    low = arm("low", 1, 1, 1)
    sunk = replace(low, y=np.append(low.y[:-1], 0.99), group={"arm": "sunk"})
    (row,) = matched_of((low, sunk), [])
    assert row["net_effect"] is None and row["effect"][0] > 0
