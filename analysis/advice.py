"""Which runs to buy next: those that narrow one named interval most for their price.

The interval after a set of runs is the Gauss-Newton t interval with their gradients added to the information matrix,
averaged over draws of the parameters, since the runs must serve the truth and not the present estimate alone. Runs of
one trunk share its luck: a second branch tells less than a second trunk (analysis/information.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.crossings import draw
from analysis.fit import Fit
from analysis.information import Side, half_widths
from analysis.laws import Array
from analysis.variances import Spread, has_branches

DRAWS = 24
GOALS = ("exponent", "prediction", "comparison")


@dataclass(frozen=True)
class Candidate:
    """A run that could be bought. Runs of one trunk share its price: a smaller one costs only its own decay."""

    run_id: str
    arm: str
    trunk: str
    n: float
    d: float
    c: float
    price: float
    own_share: float


@dataclass(frozen=True)
class Goal:
    """The interval to narrow: an exponent of the first fit, its law at `place`, or the difference of two there."""

    kind: str
    fits: tuple[Fit, ...]
    parameter: str = "alpha"
    place: dict[str, float] | None = None
    level: float = 0.95


@dataclass(frozen=True)
class Advice:
    """Chosen runs, their price, and the half-width of the goal's interval before, after, and for an even spread."""

    chosen: tuple[Candidate, ...]
    price: float
    before: float
    after: float
    even: float


def _trunk_price(mates: Sequence[Candidate]) -> float:
    """The longest run of a trunk in full, the others only from where they leave it."""
    if not mates:
        return 0.0
    longest = max(mates, key=lambda c: c.price)
    return longest.price + sum(c.price * c.own_share for c in mates if c is not longest)


class _Basket:
    """Chosen candidates with their price; a run's price depends on what else is bought of its trunk."""

    def __init__(self) -> None:
        self.trunks: dict[str, list[Candidate]] = {}
        self.spent = 0.0

    def cost(self, candidate: Candidate) -> float:
        mates = self.trunks.get(candidate.trunk, [])
        return _trunk_price([*mates, candidate]) - _trunk_price(mates)

    def add(self, candidate: Candidate) -> None:
        self.spent += self.cost(candidate)
        self.trunks.setdefault(candidate.trunk, []).append(candidate)


def price(chosen: Sequence[Candidate]) -> float:
    """What a set of runs costs."""
    basket = _Basket()
    for candidate in chosen:
        basket.add(candidate)
    return basket.spent


def _log_gradient(fit: Fit, thetas: Array, places: Sequence[dict[str, float]]) -> Array:
    """Gradient of the log of the law at each place, per draw: (S, K, p)."""
    u = fit.coordinates(**{axis: np.array([p[axis] for p in places]) for axis in fit.law.axes})
    value, gradient = fit.law.evaluate(thetas, u)
    return (gradient / value[:, None])[:, ~fit.frozen].transpose(0, 2, 1)


def _wanted(fit: Fit, goal: Goal, thetas: Array) -> Array:
    """The gradient of what is to be known, per draw: (S, p)."""
    if goal.kind == "exponent":
        index = [p for p, held in zip(fit.law.parameters, fit.frozen, strict=True) if not held].index(goal.parameter)
        return np.tile(np.eye(fit.free)[index], (len(thetas), 1))
    assert goal.place is not None
    return _log_gradient(fit, thetas, [goal.place])[:, 0]


def _side(
    fit: Fit, goal: Goal, candidates: Sequence[Candidate], present: Mapping[int, str], rng: np.random.Generator
) -> Side:
    thetas, points = np.vstack([fit.theta, draw(fit, DRAWS - 1, rng)]), fit.points
    held = [{axis: float(points.axis(axis)[i]) for axis in fit.law.axes} for i in range(len(points))]
    x = _log_gradient(fit, thetas, held)
    information = x.transpose(0, 2, 1) @ x
    information += 1e-12 * np.trace(information, axis1=1, axis2=2)[:, None, None] * np.eye(information.shape[1])
    places, kind = np.unique([(c.n, c.d, c.c) for c in candidates], axis=0, return_inverse=True)
    # a run of another arm is of the last kind, which tells nothing
    kind = np.where([c.arm == points.name for c in candidates], kind.ravel(), len(places))
    vectors = _log_gradient(fit, thetas, [dict(zip(("n", "d", "c"), p, strict=True)) for p in places.tolist()])
    vectors = np.concatenate([vectors, np.zeros_like(vectors[:, :1])], axis=1)
    # a trunk of the table is known by name where its rows have one
    rows = [present.get(int(row), f"#{code}") for row, code in zip(points.rows, points.cluster, strict=True)]
    names, trunks = np.unique([*rows, *(c.trunk for c in candidates)], return_inverse=True)
    of_rows, of_candidates = trunks[: len(rows)], trunks[len(rows) :]
    sums = np.eye(len(names))[of_rows].T @ x
    meat, runs = sums.transpose(0, 2, 1) @ sums, np.bincount(of_rows, minlength=len(names))
    spreads = _spreads(fit, len(np.unique(of_candidates)) < len(candidates))
    return Side(_wanted(fit, goal, thetas), information, meat, sums, runs, vectors, kind, of_candidates, *spreads)


def _spreads(fit: Fit, branches: bool) -> tuple[Spread, Spread]:
    """Variances within a run and between trunks. A table whose trunks have one run each cannot tell them apart: where
    branches are on offer, half of what it has is taken to be a trunk's."""
    if fit.between[0] or has_branches(fit.points) or not branches:
        return fit.within, fit.between
    half = fit.within[0] / 2, fit.within[1] / 2
    return half, half


def _half_widths(sides: Sequence[Side], level: float) -> Array:
    """Half-width of the goal's interval per draw (S,)."""
    return half_widths([part for side in sides for part in side.parts()], level)


def _after_each(sides: Sequence[Side], level: float) -> Array:
    """Mean log half-width (K,) after adding each candidate alone."""
    return np.log(half_widths([part for side in sides for part in side.parts_with_each()], level)).mean(0)


def _greedy(
    sides: Sequence[Side], candidates: Sequence[Candidate], budget: float, level: float, thrift: float
) -> list[int]:
    """Adds the run with the best gain per price^thrift until nothing affordable helps."""
    sides, chosen, basket = [side.copy() for side in sides], [], _Basket()
    costs = np.array([basket.cost(c) for c in candidates])
    open_ = np.ones(len(candidates), bool)
    while True:
        now = float(np.log(_half_widths(sides, level)).mean())
        gains = now - _after_each(sides, level)
        rates = gains / np.maximum(costs, 1e-12 * budget) ** thrift
        rates[~open_ | (gains <= 0) | (basket.spent + costs > budget * (1 + 1e-12))] = -np.inf
        best = int(np.argmax(rates))
        if not np.isfinite(rates[best]):
            return chosen
        chosen.append(best)
        open_[best] = False
        for side in sides:
            side.add(best)
        basket.add(candidates[best])
        for k, c in enumerate(candidates):
            if c.trunk == candidates[best].trunk:
                costs[k] = basket.cost(c)


def even_spread(candidates: Sequence[Candidate], budget: float) -> list[int]:
    """The plain alternative: whole passes over the ladder, every size and data size in turn, while the budget lasts."""
    seen: dict[tuple[str, float, float], int] = {}
    passes = []
    for k, c in enumerate(candidates):
        key = (c.arm, c.n, c.d)
        seen[key] = seen.get(key, 0) + 1
        passes.append((seen[key], c.n, c.d, k))
    chosen, basket = [], _Basket()
    for *_, k in sorted(passes):
        if basket.spent + basket.cost(candidates[k]) <= budget * (1 + 1e-12):
            chosen.append(k)
            basket.add(candidates[k])
    return chosen


def expected(sides: Sequence[Side], chosen: Sequence[int], level: float) -> float:
    """Geometric mean over the draws of the goal's half-width with the chosen runs."""
    sides = [side.copy() for side in sides]
    for side in sides:
        for k in chosen:
            side.add(k)
    return float(np.exp(np.log(_half_widths(sides, level)).mean()))


def advise(
    goal: Goal, candidates: Sequence[Candidate], budget: float, present: Mapping[int, str] | None = None
) -> Advice:
    """The best of several greedy sets within `budget` (in the candidates' prices); deterministic.

    `present` names the trunks of the table's rows, which candidates may go on from.
    """
    rng = np.random.default_rng(0)
    names = {f.points.name for f in goal.fits}
    usable = [c for c in candidates if c.arm in names and c.price <= budget]
    sides = [_side(f, goal, usable, present or {}, rng) for f in goal.fits]
    sets = [_greedy(sides, usable, budget, goal.level, thrift) for thrift in (1.0, 0.5, 0.0)] if usable else [[]]
    even = even_spread(usable, budget)
    chosen = min([*sets, even], key=lambda s: expected(sides, s, goal.level))
    return Advice(
        tuple(usable[k] for k in chosen), price([usable[k] for k in chosen]), expected(sides, [], goal.level),
        expected(sides, chosen, goal.level), expected(sides, even, goal.level),
    )  # fmt: skip
