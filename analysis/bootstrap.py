"""Intervals by refitting: profile F for least squares, wild and pairs bootstraps over whole clusters.

A percentile residual bootstrap without a degrees-of-freedom correction covers .77 to .81 at six sizes; none is offered.
"""

from __future__ import annotations

import numpy as np

from analysis.distributions import f_quantile
from analysis.fit import Fit
from analysis.intervals import LEVEL, parameter_intervals
from analysis.laws import Array
from analysis.solver import Solution, minimise
from analysis.table import InvalidTable
from analysis.variances import has_branches

# Webb 2014 (Reworking wild bootstrap based inference for clustered errors): below about ten clusters there are too few
# ways to flip or to draw them
ENOUGH_CLUSTERS = 10
METHODS = ("gauss-newton-t", "profile-F", "wild-cluster", "pairs-cluster")


def refit(fit: Fit, y: Array, weights: Array, tolerance: float = 3e-5) -> Solution:
    """The same law from the fit's own optimum on many tables: y over the metric's scale and weights, (B, n) each."""
    u = fit.coordinates(**{axis: fit.points.axis(axis) for axis in fit.law.axes})
    start = np.repeat(fit.theta[None], max(len(np.atleast_2d(y)), len(np.atleast_2d(weights))), axis=0)
    return minimise(fit.law, u, y, start, fit.objective, weights, fit.frozen, iterations=80, tolerance=tolerance)


def wild_cluster(fit: Fit, draws: int, rng: np.random.Generator) -> Array:
    """Parameter draws (draws, p): each cluster's residuals keep their pattern and take one random sign.

    Residuals are inflated by sqrt(n / (n - p)): least squares leaves too small ones.
    """
    codes = np.unique(fit.points.cluster, return_inverse=True)[1]
    signs = rng.choice([-1.0, 1.0], size=(draws, codes.max() + 1))[:, codes]
    shift = signs * fit.residual * np.sqrt(len(fit.points) / (len(fit.points) - fit.free))
    fitted = fit.predict(**{axis: fit.points.axis(axis) for axis in fit.law.axes}) / fit.scale
    y = fitted * np.exp(shift) if fit.objective.logarithmic else fitted + shift
    return refit(fit, y, fit.weights).theta


def pairs_cluster(fit: Fit, draws: int, rng: np.random.Generator) -> Array:
    """Parameter draws (draws, p): whole clusters drawn with replacement, where three sizes or more remain."""
    labels, codes = np.unique(fit.points.cluster, return_inverse=True)
    counts = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=draws)[:, codes]
    axis = fit.points.axis(fit.law.axes[0])
    levels = (axis[None] == np.unique(axis)[:, None]).astype(float)
    enough = ((counts @ levels.T) > 0).sum(1) >= 3
    enough &= (counts > 0).sum(1) > fit.free
    return refit(fit, fit.points.y / fit.scale, counts[enough] * fit.weights).theta


def _percentiles(fit: Fit, thetas: Array, level: float) -> dict[str, tuple[float, float]]:
    draws = [{p.name: p.value for p in fit.law.public(theta, fit.center, fit.scale)} for theta in thetas]
    tail = 50 * (1 - level)
    out = {}
    for name in draws[0]:
        low, high = np.percentile([d[name] for d in draws], [tail, 100 - tail])
        out[name] = (float(low), float(high))
    return out


def _profile(fit: Fit, index: int, level: float) -> tuple[float, float]:
    """Where the profiled sum of squares has risen by F(1, n - p) residual variances, for one parameter."""
    # an import as long as a table's fits: only where profiles are asked for
    from scipy.optimize import brentq

    dof = len(fit.points) - fit.free
    limit = fit.value * (1 + f_quantile(level, 1, dof) / dof)
    frozen = fit.frozen.copy()
    frozen[index] = True
    u = fit.coordinates(**{axis: fit.points.axis(axis) for axis in fit.law.axes})
    low, high = (bound[index] for bound in fit.law.bounds())

    def excess(value: float) -> float:
        start = np.repeat(fit.theta[None], 3, axis=0)
        start[:, index] = value
        start[1:] += np.where(frozen, 0.0, np.array([[-0.1], [0.1]]) * np.abs(start[1:]))
        found = minimise(fit.law, u, fit.points.y / fit.scale, start, fit.objective, fit.weights, frozen)
        return float(found.value.min() - limit)

    step = max(float(np.sqrt(fit.covariance[index, index])), 1e-6)
    ends = []
    for sign, bound in ((-1.0, low), (1.0, high)):
        inside, reach = fit.theta[index], step
        end = bound
        for _ in range(30):
            outside = float(np.clip(fit.theta[index] + sign * reach, low, high))
            if excess(outside) > 0:
                end = float(brentq(excess, inside, outside, xtol=1e-7))  # type: ignore[arg-type]
                break
            if outside == bound:
                break
            inside, reach = outside, reach * 1.7
        ends.append(end)
    return ends[0], ends[1]


def profile_intervals(fit: Fit, level: float = LEVEL) -> dict[str, tuple[float, float]]:
    """Profile F intervals of the floor and the exponents; amplitudes keep their Gauss-Newton ones."""
    out = parameter_intervals(fit, level)
    for index, name in enumerate(fit.law.parameters):
        if name in out and not fit.frozen[index]:
            scale = fit.scale if name == "E" else 1.0
            low, high = _profile(fit, index, level)
            out[name] = (low * scale, high * scale)
    return out


def intervals(fit: Fit, method: str, level: float = LEVEL, draws: int = 1000) -> dict[str, tuple[float, float]]:
    """Intervals of every reported parameter by one of METHODS; deterministic.

    Raises InvalidTable for profile F and the wild bootstrap under a robust objective: its optimum is not where the sum
    of squares is least, and its estimate does not follow residuals whose signs are flipped. Also for profile F where
    trunks hold several rows, since it takes all rows as independent, and for bootstraps of fewer than ENOUGH_CLUSTERS.
    """
    if method == "gauss-newton-t":
        return parameter_intervals(fit, level)
    if method != "pairs-cluster" and fit.objective.name not in ("lse", "lse-log"):
        raise InvalidTable("NEEDS_SQUARES", f"--interval {method} needs --objective lse-log or lse")
    where, trunks = f"{fit.points.metric} in {fit.points.name}", len(np.unique(fit.points.cluster))
    if method == "profile-F" and has_branches(fit.points):
        raise InvalidTable(
            "SHARED_TRUNKS", f"{where} has several rows a trunk: --interval profile-F takes all as alone"
        )
    if method != "profile-F" and trunks < ENOUGH_CLUSTERS:
        message = f"{where}: {trunks} trunks, --interval {method} needs {ENOUGH_CLUSTERS}: take {METHODS[0]}"
        raise InvalidTable("FEW_TRUNKS", message)
    if method == "profile-F":
        return profile_intervals(fit, level)
    rng = np.random.default_rng(0)
    sampler = {"wild-cluster": wild_cluster, "pairs-cluster": pairs_cluster}[method]
    return _percentiles(fit, sampler(fit, draws, rng), level)
