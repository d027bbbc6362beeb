"""Which runs to buy next: those that narrow one named interval most for their price.

The interval after a set of runs is the Gauss-Newton t interval with their gradients added to the information matrix,
averaged over draws of the parameters, since the runs must serve the truth and not the present estimate alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.crossings import draw
from analysis.distributions import two_sided
from analysis.fit import Fit
from analysis.laws import Array

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


@dataclass
class _Side:
    """One arm's part of the goal over S draws: information (S, p, p), goal (S, p), kinds of candidates (S, K, p).

    Candidates at one place are one kind: they carry the same information, whatever their seed.
    """

    information: Array
    goal: Array
    vectors: Array
    kind: np.ndarray
    sigma: float
    dof: float


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


def _side(fit: Fit, goal: Goal, candidates: Sequence[Candidate], rng: np.random.Generator) -> _Side:
    thetas = np.vstack([fit.theta, draw(fit, DRAWS - 1, rng)])
    present = [{axis: float(fit.points.axis(axis)[i]) for axis in fit.law.axes} for i in range(len(fit.points))]
    rows = _log_gradient(fit, thetas, present)
    information = rows.transpose(0, 2, 1) @ rows
    information += 1e-12 * np.trace(information, axis1=1, axis2=2)[:, None, None] * np.eye(information.shape[1])
    places, kind = np.unique([(c.n, c.d, c.c) for c in candidates], axis=0, return_inverse=True)
    mine = np.array([c.arm == fit.points.name for c in candidates])
    # a run of another arm is of the last kind, which tells nothing
    kind = np.where(mine, kind.ravel(), len(places))
    vectors = _log_gradient(fit, thetas, [dict(zip(("n", "d", "c"), p, strict=True)) for p in places.tolist()])
    vectors = np.concatenate([vectors, np.zeros_like(vectors[:, :1])], axis=1)
    if goal.kind == "exponent":
        index = [p for p, held in zip(fit.law.parameters, fit.frozen, strict=True) if not held].index(goal.parameter)
        wanted = np.zeros((len(thetas), information.shape[1]))
        wanted[:, index] = 1.0
    else:
        assert goal.place is not None
        wanted = _log_gradient(fit, thetas, [goal.place])[:, 0]
    sigma = float(np.sqrt(fit.within[0] + fit.between[0]))
    return _Side(information, wanted, vectors, kind, sigma, fit.within[1])


def _half_widths(sides: Sequence[_Side], extra: int, level: float) -> Array:
    """Half-width of the goal's interval per draw (S,), with `extra` runs already in the information."""
    variance = sum(
        s.sigma**2 * np.einsum("sp,sp->s", s.goal, np.linalg.solve(s.information, s.goal[:, :, None])[:, :, 0])
        for s in sides
    )
    dof = sum(s.dof for s in sides) + extra
    return two_sided(level, dof) * np.sqrt(np.maximum(variance, 0.0))


def _after_each(sides: Sequence[_Side], extra: int, level: float) -> Array:
    """Mean log half-width (K,) after adding each candidate alone (Sherman-Morrison)."""
    variance: Array | float = 0.0
    for s in sides:
        solved = np.linalg.solve(s.information, np.concatenate([s.goal[:, None], s.vectors], axis=1).transpose(0, 2, 1))
        toward, spread = solved[:, :, 0], solved[:, :, 1:]
        base = np.einsum("sp,sp->s", s.goal, toward)
        gain = np.einsum("sp,spk->sk", s.goal, spread) ** 2 / (1 + np.einsum("skp,spk->sk", s.vectors, spread))
        variance = variance + s.sigma**2 * np.maximum(base[:, None] - gain, 1e-300)[:, s.kind]
    dof = sum(s.dof for s in sides) + extra + 1
    return np.log(two_sided(level, dof) * np.sqrt(variance)).mean(0)


def _add(sides: Sequence[_Side], index: int) -> None:
    for s in sides:
        v = s.vectors[:, s.kind[index]]
        s.information = s.information + v[:, :, None] * v[:, None, :]


def _copies(sides: Sequence[_Side]) -> list[_Side]:
    return [_Side(s.information.copy(), s.goal, s.vectors, s.kind, s.sigma, s.dof) for s in sides]


def _greedy(
    sides: Sequence[_Side], candidates: Sequence[Candidate], budget: float, level: float, thrift: float
) -> list[int]:
    """Adds the run with the best gain per price^thrift until nothing affordable helps."""
    sides, chosen, basket = _copies(sides), [], _Basket()
    costs = np.array([basket.cost(c) for c in candidates])
    open_ = np.ones(len(candidates), bool)
    while True:
        now = float(np.log(_half_widths(sides, len(chosen), level)).mean())
        gains = now - _after_each(sides, len(chosen), level)
        rates = gains / np.maximum(costs, 1e-12 * budget) ** thrift
        rates[~open_ | (gains <= 0) | (basket.spent + costs > budget * (1 + 1e-12))] = -np.inf
        best = int(np.argmax(rates))
        if not np.isfinite(rates[best]):
            return chosen
        chosen.append(best)
        open_[best] = False
        _add(sides, best)
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


def expected(sides: Sequence[_Side], chosen: Sequence[int], level: float) -> float:
    """Geometric mean over the draws of the goal's half-width with the chosen runs."""
    sides = _copies(sides)
    for k in chosen:
        _add(sides, k)
    return float(np.exp(np.log(_half_widths(sides, len(chosen), level)).mean()))


def advise(goal: Goal, candidates: Sequence[Candidate], budget: float) -> Advice:
    """The best of several greedy sets within `budget` (in the candidates' prices); deterministic."""
    rng = np.random.default_rng(0)
    names = {f.points.name for f in goal.fits}
    usable = [c for c in candidates if c.arm in names and c.price <= budget]
    sides = [_side(f, goal, usable, rng) for f in goal.fits]
    sets = [_greedy(sides, usable, budget, goal.level, thrift) for thrift in (1.0, 0.5, 0.0)] if usable else [[]]
    even = even_spread(usable, budget)
    chosen = min([*sets, even], key=lambda s: expected(sides, s, goal.level))
    return Advice(
        tuple(usable[k] for k in chosen), price([usable[k] for k in chosen]), expected(sides, [], goal.level),
        expected(sides, chosen, goal.level), expected(sides, even, goal.level),
    )  # fmt: skip
