"""Where the laws of two arms meet, and which arm is the best of all at a place: with the laws' own uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.distributions import two_sided
from analysis.fit import Fit
from analysis.laws import Array
from analysis.points import comparable

DRAWS = 2000
# a crossing is looked for this far (in decades) on either side of the measured range
REACH = 2.0
# points along that range: between two of them the difference of two smooth laws is a straight line to within 1e-3
GRID = 96


def draw(fit: Fit, count: int, rng: np.random.Generator) -> Array:
    """Parameter vectors (count, p) from the fit's multivariate t, kept inside the law's bounds."""
    # By eigenvalues: where a parameter is hardly held, rounding leaves the matrix short of what Cholesky demands.
    values, vectors = np.linalg.eigh(fit.covariance)
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    scale = np.sqrt(fit.within[1] / rng.chisquare(fit.within[1], size=(count, 1)))
    low, high = fit.law.bounds()
    return np.clip(fit.theta + scale * (rng.standard_normal((count, len(fit.theta))) @ root.T), low, high)


def curves(fit: Fit, thetas: Array, x: Array) -> Array:
    """The law of each parameter vector (B, p) along its one axis: (B, n), in the metric's unit."""
    return fit.law.evaluate(thetas, fit.coordinates(**{fit.law.axes[0]: x}))[0] * fit.scale


def _first_crossing(difference: Array, x: Array) -> Array:
    """Where each row of `difference` (B, n) first changes sign along x; NaN where it does not."""
    change = difference[:, :-1] * difference[:, 1:] < 0
    where = np.argmax(change, axis=1)
    rows = np.arange(len(difference))
    d0, d1 = difference[rows, where], difference[rows, where + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(change.any(1), d0 / (d0 - d1), np.nan)
    return np.exp(np.log(x[where]) + share * (np.log(x[where + 1]) - np.log(x[where])))


def crossing(a: Fit, b: Fit, level: float, rng: np.random.Generator) -> dict[str, Any] | None:
    """Where the laws of two arms meet along their common axis: point, interval, and how often they meet at all.

    None for unlike units or axes. The interval is over the draws that meet within REACH decades of the data; there is
    none where fewer than half of them do, or where it would not hold the laws' own place: nearly parallel laws meet far
    below the data in some draws and far above in others.
    """
    if not comparable(a.points, b.points) or a.law.axes != b.law.axes or a.law.axes[1:]:
        return None
    axis = a.law.axes[0]
    values = np.concatenate([a.points.axis(axis), b.points.axis(axis)])
    x = np.geomspace(values.min() / 10**REACH, values.max() * 10**REACH, GRID)
    best = _first_crossing(curves(a, a.theta[None], x) - curves(b, b.theta[None], x), x)[0]
    met = _first_crossing(curves(a, draw(a, DRAWS, rng), x) - curves(b, draw(b, DRAWS, rng), x), x)
    share = float(np.isfinite(met).mean())
    tail = 50 * (1 - level)
    low, high = np.percentile(met[np.isfinite(met)], [tail, 100 - tail]) if share > 0.5 else (np.nan, np.nan)
    return {
        "metric": a.points.metric, "unit": a.points.unit, "a": a.points.name, "b": b.points.name, "axis": axis,
        "at": float(best) if np.isfinite(best) else None,
        "interval": [float(low), float(high)] if low <= best <= high else None, "share_of_draws": share,
        "inside_data": bool(np.isfinite(best) and values.min() <= best <= values.max()),
        **crossings_by_seed(a, b, x, level),
    }  # fmt: skip


def crossings_by_seed(a: Fit, b: Fit, x: Array, level: float) -> dict[str, Any]:
    """Where the laws of each common seed meet, whose runs saw the same data in the same order, and their mean in log x.

    The interval is Student's t over the seeds, from three on that meet.
    """
    found = {}
    for seed in (s for s in a.by_seed if s in b.by_seed):
        first, second = (curves(f, f.theta[None], x) for f in (a.by_seed[seed], b.by_seed[seed]))
        found[seed] = float(_first_crossing(first - second, x)[0])
    met = np.log([v for v in found.values() if np.isfinite(v)])
    if len(met) < 3:
        return {"by_seed": found, "paired_interval": None}
    half = two_sided(level, len(met) - 1) * float(met.std(ddof=1)) / np.sqrt(len(met))
    return {"by_seed": found, "paired_interval": [float(np.exp(met.mean() + s * half)) for s in (-1, 1)]}


def chance_of_best(fits: Sequence[Fit], places: Array, rng: np.random.Generator) -> list[dict[str, Any]]:
    """At each place along the fits' common axis: the probability that each arm's law is the best of all."""
    values = np.stack([curves(f, draw(f, DRAWS, rng), places) for f in fits])
    best = values.argmax(0) if fits[0].points.kind == "score" else values.argmin(0)
    top = max(float(f.points.axis(f.law.axes[0]).max()) for f in fits)
    return [
        {
            "metric": fits[0].points.metric, "unit": fits[0].points.unit, "axis": fits[0].law.axes[0], "at": float(x),
            "decades": max(0.0, float(np.log10(x / top))),
            "chance": {f.points.name: float((best[:, i] == k).mean()) for k, f in enumerate(fits)},
        }
        for i, x in enumerate(places)
    ]  # fmt: skip
