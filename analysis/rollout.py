"""Held-out rollout: every law is fitted on the smaller rungs and asked for the next one.

This, not the fit's own residuals, is what tells laws apart; AICc stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from analysis.fit import Fit
from analysis.intervals import predict
from analysis.points import Points
from analysis.table import AXES, InvalidTable

# one held-out rung is one draw of the noise: it ranks no laws
ENOUGH_RUNGS = 2
Refit = Callable[[Points], Fit]


def rungs(points: Points) -> np.ndarray:
    """The distinct places on the ladder, ascending: model sizes, where the table has them."""
    return np.unique(points.rung[np.isfinite(points.rung)])


def held_out(points: Points, fit: Fit, level: float) -> list[dict[str, Any]]:
    """What `fit` says of each of `points`, beside what was measured: a new run's interval, error, coverage."""
    out = []
    for i in range(len(points)):
        place = {axis: float(points.axis(axis)[i]) for axis in fit.law.axes}
        said = predict(fit, level, **place)
        measured = float(points.y[i])
        # a signed metric has no meaningful zero to be relative to
        relative = said.mean / measured - 1 if measured and points.kind != "signed" else None
        out.append({
            "held_out": {"row": int(points.rows[i]), **{axis: float(points.axis(axis)[i]) for axis in AXES}},
            "predicted": said.mean, "interval": [said.run_low, said.run_high], "mean_interval": [said.low, said.high],
            "measured": measured, "relative_error": relative,
            "covered": bool(said.run_low <= measured <= said.run_high), "decades": said.decades,
            "n_runs": len(fit.points),
        })  # fmt: skip
    return out


def rollout(points: Points, refit: Refit, level: float) -> list[dict[str, Any]]:
    """For each rung but the smallest ones: fit on all smaller rungs, predict that rung's largest data size.

    `points` of a law along one axis end at the ladder's data (`Points.within_ladder`).
    """
    sizes = rungs(points)
    top = points.ladder()
    out = []
    for k in range(2, len(sizes)):
        below = points.take(points.rung < sizes[k])
        try:
            fitted = refit(below)
        except InvalidTable:
            continue
        out += held_out(top.take(top.rung == sizes[k]), fitted, level)
    return out


def score(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Root mean square relative error and the share of intervals that covered."""
    errors = np.array([e["relative_error"] for e in entries if e["relative_error"] is not None])
    if not len(errors):
        return None
    return {
        "rms_relative_error": float(np.sqrt((errors**2).mean())),
        "covered": int(sum(e["covered"] for e in entries)),
        "n": len(entries),
    }


def on_common_rows(rollouts: Sequence[Sequence[dict[str, Any]]], axis: str) -> list[dict[str, Any] | None]:
    """The `score` of each rollout on the rows that all were asked for; None for all where those are too few rungs.

    A rollout of fewer than ENOUGH_RUNGS along `axis` has None itself, and does not narrow the others.
    """

    def rungs_in(entries: Sequence[dict[str, Any]]) -> int:
        return len({e["held_out"][axis] for e in entries})

    known = [[e for e in entries if e["relative_error"] is not None] for entries in rollouts]
    rivals = [{e["held_out"]["row"] for e in entries} for entries in known if rungs_in(entries) >= ENOUGH_RUNGS]
    rows = set.intersection(*rivals) if rivals else set()
    shared = [[e for e in entries if e["held_out"]["row"] in rows] for entries in known]
    enough = max(map(rungs_in, shared), default=0) >= ENOUGH_RUNGS
    return [
        score(common) if enough and rungs_in(entries) >= ENOUGH_RUNGS else None
        for common, entries in zip(shared, known, strict=True)
    ]
