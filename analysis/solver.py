"""One batched Levenberg-Marquardt for every objective: multi-starts, bootstrap refits and profiles are all batches.

`success` of a general optimiser proves nothing about these surfaces (narrow valleys, a Huber threshold far below the
noise), so the caller compares many starts, and an independent variable projection, by the objective they reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.laws import Array, Law, SumLaw

# Hoffmann et al. 2022 (arXiv 2203.15556), appendix D.2
HUBER_DELTA = 1e-3
# a relative fall of the objective that rounding alone can make, and that share of a coarser tolerance
IDLE, IDLE_SHARE = 1e-14, 1e-3
# where only the valley is looked for: what is found there is finished at full tolerance
SCREEN_TOLERANCE = 1e-6
# damping at which a step that does not descend shows the optimum: at 1 it already majorises the objective
NO_DESCENT = 1e5
OBJECTIVES = ("huber-log", "lse-log", "lse", "quasi-binomial")


@dataclass(frozen=True)
class Objective:
    """What is summed over the points: `huber-log`, `lse-log` (log residuals), `lse` (raw), `quasi-binomial`.

    `penalty` multiplies the weight of points below the law: rungs that were tuned badly lie above it. 1, none, is the
    default: it moves exponents by .05.
    """

    name: str = "huber-log"
    delta: float = HUBER_DELTA
    penalty: float = 1.0

    @property
    def logarithmic(self) -> bool:
        return self.name.endswith("-log")

    @property
    def robust(self) -> bool:
        return self.name == "huber-log"

    def residuals(self, value: Array, gradient: Array, y: Array) -> tuple[Array, Array]:
        """Residuals (B, n) and their gradient (B, p, n); their squares' curvature is the Gauss-Newton matrix."""
        if self.logarithmic:
            return np.log(value) - np.log(y), gradient / value[:, None]
        if self.name == "quasi-binomial":
            spread = np.sqrt(np.clip(value * (1.0 - value), 1e-12, None))
            return (value - y) / spread, gradient / spread[:, None]
        return value - y, gradient

    def sided(self, weights: Array, residual: Array) -> Array:
        """Weights with the penalty on points that the law over-estimates."""
        return weights if self.penalty == 1.0 else weights * np.where(residual > 0, self.penalty, 1.0)

    def total(self, value: Array, residual: Array, y: Array, weights: Array) -> Array:
        """The objective (B,) that is minimised."""
        weights = self.sided(weights, residual)
        if self.name == "quasi-binomial":
            p = np.clip(value, 1e-12, 1 - 1e-12)
            return -(weights * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum(-1)
        if self.robust:
            size = np.abs(residual)
            inside = np.minimum(size, self.delta)
            return (weights * (inside * (size - 0.5 * inside))).sum(-1)
        return 0.5 * (weights * residual**2).sum(-1)


@dataclass(frozen=True)
class Solution:
    """Optima of a batch: parameters (B, p), objective (B,), whether each met its tolerance (B,)."""

    theta: Array
    value: Array
    converged: np.ndarray


@dataclass
class _State:
    """The live part of a batch; problems leave it as they converge."""

    theta: Array
    objective: Array
    residual: Array
    jacobian: Array
    damping: Array

    def take(self, rows: np.ndarray) -> _State:
        """The problems of these rows."""
        return _State(
            self.theta[rows], self.objective[rows], self.residual[rows], self.jacobian[rows], self.damping[rows]
        )

    def where(self, better: np.ndarray, other: _State) -> _State:
        """These problems where they are better, else the others; each with its own damping from here."""
        if better.all():
            return self
        return _State(
            np.where(better[:, None], self.theta, other.theta),
            np.where(better, self.objective, other.objective),
            np.where(better[:, None], self.residual, other.residual),
            np.where(better[:, None, None], self.jacobian, other.jacobian),
            self.damping,
        )


def _look(law: Law, u: Array, y: Array, weights: Array, objective: Objective, theta: Array) -> _State:
    with np.errstate(all="ignore"):
        value, gradient = law.evaluate(theta, u)
        residual, jacobian = objective.residuals(value, gradient, y)
        total = objective.total(value, residual, y, weights)
    return _State(theta, np.where(np.isfinite(total), total, np.inf), residual, jacobian, np.empty(0))


def _step(state: _State, weights: Array, objective: Objective, frozen: np.ndarray, low: Array, high: Array) -> Array:
    """The damped Newton step of each live problem, zero along frozen coordinates and against a bound it rests on.

    Under Huber the Newton curvature counts only residuals inside the threshold; the damping adds the majorising
    (reweighted) curvature, so a fully damped step always descends and an undamped one converges quadratically.
    """
    jac, res, damping = state.jacobian, state.residual, state.damping[:, None]
    weights = objective.sided(weights, res)
    if objective.robust:
        size = np.abs(res)
        major = weights * (objective.delta / np.maximum(size, objective.delta))
        curvature = weights * (size <= objective.delta) + damping * major
        psi = major * res
    else:
        psi, major, curvature = weights * res, weights, (1.0 + damping) * weights
    gradient = (jac @ psi[:, :, None])[:, :, 0]
    stuck = frozen | ((state.theta <= low) & (gradient > 0)) | ((state.theta >= high) & (gradient < 0))
    matrix = (jac * curvature[:, None]) @ jac.transpose(0, 2, 1)
    diagonal = ((jac * jac) @ major[:, :, None])[:, :, 0]
    if stuck.any():
        matrix[stuck[:, :, None] | stuck[:, None, :]] = 0.0
        gradient = np.where(stuck, 0.0, gradient)
    ridge = damping * diagonal + 1e-15 * diagonal.max(1, keepdims=True) + 1e-300
    # a view of the diagonals
    np.einsum("bii->bi", matrix)[:] += np.where(stuck, 1.0, ridge)
    return -np.linalg.solve(matrix, gradient[:, :, None])[:, :, 0]


def minimise(
    law: Law,
    u: Array,
    y: Array,
    start: Array,
    objective: Objective,
    weights: Array | None = None,
    frozen: np.ndarray | None = None,
    iterations: int = 300,
    tolerance: float = 1e-11,
) -> Solution:
    """Minimises a batch of problems that share their coordinates u (axes, n).

    y and weights are (n,) or one row a problem (B, n); start is (B, p); frozen (p,) marks coordinates kept as given.
    A problem has converged when a full step moves every coordinate by less than `tolerance`, or none descends any more.
    """
    low, high = law.bounds()
    batch = len(start)
    y = np.broadcast_to(y, (batch, u.shape[1]))
    weights = np.broadcast_to(1.0 if weights is None else weights, (batch, u.shape[1]))
    frozen = np.zeros(start.shape[1], bool) if frozen is None else frozen
    theta = np.where(frozen, start, np.clip(start, low, high))
    final, reached, done = theta.copy(), np.full(batch, np.inf), np.zeros(batch, bool)
    live, y_live, w_live = np.arange(batch), y, weights
    state, idly = _look(law, u, y, weights, objective, theta), max(IDLE, IDLE_SHARE * tolerance)
    state.damping = np.full(batch, 1.0 if objective.robust else 1e-3)
    for _ in range(iterations):
        step = _step(state, w_live, objective, frozen, low, high)
        trial = np.where(frozen, state.theta, np.minimum(np.maximum(state.theta + step, low), high))
        moved = np.abs(trial - state.theta).max(1)
        seen = _look(law, u, y_live, w_live, objective, trial)
        better = seen.objective < state.objective
        with np.errstate(invalid="ignore"):
            idle = state.objective - seen.objective <= idly * np.abs(state.objective)
        stop = np.where(better, ((moved < tolerance) | idle) & (state.damping < 1e-2), state.damping > NO_DESCENT)
        stop |= ~better & (moved < tolerance)
        harder = np.maximum(state.damping, 1e-8) * 8.0
        seen.damping = np.minimum(np.maximum(np.where(better, state.damping * 0.1, harder), 1e-14), 1e12)
        state = seen.where(better, state)
        if stop.any():
            final[live[stop]], reached[live[stop]], done[live[stop]] = state.theta[stop], state.objective[stop], True
            keep = np.flatnonzero(~stop)
            live, y_live, w_live = live[keep], y_live[keep], w_live[keep]
            state = state.take(keep)
        if not len(live):
            break
    final[live], reached[live] = state.theta, state.objective
    return Solution(final, reached, done)


def project(
    law: SumLaw, u: Array, y: Array, objective: Objective, weights: Array, frozen: np.ndarray, theta: Array
) -> Solution:
    """Variable projection: exponents on a zooming grid, floor and amplitudes solved for each; polished at the end.

    Independent of the multi-start's path: exponents are searched from the whole allowed range, not from `theta`, which
    only supplies frozen coordinates. Returns a batch of one.
    """
    k, f = len(law.axes), int(law.floored)
    fixed = frozen.copy()
    fixed[f + k :] = True
    low, high = np.full(k, 0.01), np.full(k, 4.0)
    count, best = (9, None) if k == 2 else (15, None)
    for _ in range(7):
        axes = [np.geomspace(a, b, count) for a, b in zip(low, high, strict=True)]
        powers = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, k)
        start = np.where(frozen, theta, law.at(powers, u, y))
        solved = minimise(law, u, y, start, objective, weights, fixed, iterations=30, tolerance=SCREEN_TOLERANCE)
        best = solved.theta[np.argmin(solved.value)]
        ratio = (high / low) ** (1.5 / (count - 1))
        low, high = np.maximum(best[f + k :] / ratio, 1e-4), np.minimum(best[f + k :] * ratio, 5.0)
    assert best is not None
    return minimise(law, u, y, best[None], objective, weights, frozen)
