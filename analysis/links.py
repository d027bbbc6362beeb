"""From loss to the metrics people care about: one straight line per arm, judged by rungs it has not seen.

Arms are never pooled (loss ranks sizes within an arm, not arms), and an in-sample error says nothing about a chained
prediction, so both errors are reported from held-out rungs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.distributions import normal_quantile
from analysis.laws import Array, LogitLaw
from analysis.points import Points
from analysis.rollout import Refit, rungs
from analysis.table import InvalidTable

# Fluid (arXiv 2410.13863), random + continuous: validation loss to FID and to GenEval
PUBLISHED_R = {"fd": 0.917, "fid": 0.917, "geneval": -0.931}
CEILINGS = (1.0, 0.8)


@dataclass(frozen=True)
class Joined:
    """Points of one arm where both the loss and the metric were measured; arrays (n,)."""

    n: Array
    c: Array
    loss: Array
    value: Array
    se: Array


def join(loss: Points, metric: Points) -> Joined:
    """The rows that carry both."""
    shared, left, right = np.intersect1d(loss.rows, metric.rows, return_indices=True)
    del shared
    return Joined(loss.rung[left], loss.c[left], loss.y[left], metric.y[right], metric.se[right])


def pearson(x: Array, y: Array, level: float) -> tuple[float, float, float] | None:
    """Pearson's r with Fisher's interval; None under four points or without spread."""
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    r = float(np.corrcoef(x, y)[0, 1])
    half = normal_quantile(0.5 + level / 2) / np.sqrt(len(x) - 3)
    centre = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    return r, float(np.tanh(centre - half)), float(np.tanh(centre + half))


def _line(x: Array, y: Array) -> tuple[float, float]:
    slope, intercept = np.polyfit(x, y, 1)
    return float(intercept), float(slope)


def _held_out(joined: Joined) -> list[dict[str, float]]:
    """Line through the smaller rungs, asked for the next rung, at its measured loss."""
    out = []
    for k, size in enumerate(rungs_of(joined)):
        below, here = joined.n < size, joined.n == size
        if k < 3 or np.ptp(joined.loss[below]) == 0:
            continue
        intercept, slope = _line(joined.loss[below], joined.value[below])
        for x, y in zip(joined.loss[here], joined.value[here], strict=True):
            said = intercept + slope * x
            out.append({"n": float(size), "predicted": said, "measured": float(y), "error": said - float(y)})
    return out


def rungs_of(joined: Joined) -> Array:
    return np.unique(joined.n)


def _chained(joined: Joined, loss: Points, refit: Refit) -> list[dict[str, float]]:
    """N -> predicted loss -> metric for the next rung: both steps know the smaller rungs only."""
    out = []
    top, known = loss.largest_data(), loss.within_ladder()
    for size in rungs(loss)[3:]:
        below, here = joined.n < size, joined.n == size
        try:
            law = refit(known.take(known.rung < size))
        except InvalidTable:
            continue
        if below.sum() < 3 or not here.any():
            continue
        place = top.take(top.rung == size)
        said_loss = law.predict(**{a: place.axis(a)[:1] for a in law.law.axes})[0]
        intercept, slope = _line(joined.loss[below], joined.value[below])
        said, measured = intercept + slope * float(said_loss), float(joined.value[here].mean())
        out.append({"n": float(size), "predicted": said, "measured": measured, "error": said - measured})
    return out


def _rms(entries: list[dict[str, float]], relative: bool) -> float | None:
    if not entries:
        return None
    errors = [e["error"] / (e["measured"] if relative and e["measured"] else 1.0) for e in entries]
    return float(np.sqrt(np.mean(np.square(errors))))


def link(loss: Points, metric: Points, refit: Refit, level: float) -> dict[str, Any] | None:
    """The straight line metric = a + b loss in one arm, its correlation, and its errors on held-out rungs.

    Errors are relative for distances and in score points for scores. None where fewer than three rows carry both.
    """
    joined = join(loss.largest_data(), metric.largest_data())
    if len(joined.n) < 3 or np.ptp(joined.loss) == 0:
        return None
    intercept, slope = _line(joined.loss, joined.value)
    fitted = intercept + slope * joined.loss
    relative = metric.kind == "distance"
    held, chained = _held_out(joined), _chained(joined, loss, refit)
    inside = [{"error": f - y, "measured": y} for f, y in zip(fitted, joined.value, strict=True)]
    return {
        "group": dict(loss.group), "loss": loss.metric, "metric": metric.metric, "unit": metric.unit,
        "n": len(joined.n),
        "intercept": intercept, "slope": slope, "pearson": pearson(joined.loss, joined.value, level),
        "published_r": PUBLISHED_R.get(metric.metric), "error_is": "relative" if relative else "absolute",
        "error_in_sample": _rms(inside, relative), "error_held_out": _rms(held, relative),
        "error_chained": _rms(chained, relative), "held_out": held, "chained": chained,
        "points": {"n": joined.n, "loss": joined.loss, "value": joined.value, "se": joined.se},
    }  # fmt: skip


def ceiling_band(metric: Points, fit_with: Any) -> list[dict[str, Any]]:
    """A score's law under ceilings 1.0 and .8 one decade beyond the data: the spread is what the ceiling decides.

    `fit_with(law, points)` fits a law to points. Ceilings that the scores already pass are left out.
    """
    used = metric.largest_data()
    out = []
    for ceiling in CEILINGS:
        if used.y.max() >= ceiling:
            continue
        try:
            fitted = fit_with(LogitLaw(axes=("c",), ceiling=ceiling), used)
        except InvalidTable:
            continue
        x = np.geomspace(used.c.min(), used.c.max() * 10, 40)
        out.append({"group": dict(metric.group), "metric": metric.metric, "ceiling": ceiling, "x": x,
                    "mean": fitted.predict(c=x)})  # fmt: skip
    return out
