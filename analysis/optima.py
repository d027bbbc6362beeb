"""Where a metric is best along one setting that was varied at every size, and how the best value moves with size.

A parabola through the best value and its neighbours, in the logs (scores as they are), as rates are tuned by hand.
Intervals hold the evaluation's errors; what another seed would give they hold only where a value was run with several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.laws import Array
from analysis.points import Points
from analysis.table import numbers

DRAWS = 2000
# fewer values have no best one between others
VALUES = 3
# what a rate is scaled by, in a record of our own; a table without it is asked along N
WIDTH = "model.width"


def optima(points: Sequence[Points], frame: pd.DataFrame, level: float) -> list[dict[str, Any]]:
    """A row for each group and metric whose runs differ in one positive number alone, at one data size."""
    return [row for p in points if (row := _optimum(p, frame, level)) is not None]


def _optimum(points: Points, frame: pd.DataFrame, level: float) -> dict[str, Any] | None:
    if len(points.mixed) != 1 or points.kind == "signed" or not np.isfinite(points.n).all():
        return None
    top, by_row = points.largest_data(), frame.set_index("_row")
    setting = numbers(by_row.loc[top.rows, points.mixed[0]])[0]
    if not (setting > 0).all() or not np.isfinite(top.error).all():
        return None
    scale = numbers(by_row.loc[top.rows, WIDTH])[0] if WIDTH in frame else top.n
    sizes = [np.flatnonzero(top.n == n) for n in np.unique(top.n)]
    if any(len(np.unique(setting[here])) < VALUES for here in sizes):
        return None
    rng, found = np.random.default_rng(0), []
    for here in sizes:
        values, y, error = _by_value(setting[here], top.y[here], top.error[here])
        draws = _vertices(values, _drawn(y, error, points.kind, rng))
        best, ends = draws[0], np.quantile(draws[1:], [(1 - level) / 2, (1 + level) / 2])
        row = {"n": float(top.n[here[0]]), "size": top.sizes.get(int(top.rows[here[0]]), ""), "values": values, "y": y}
        row |= {"error": error, "best": float(best), "interval": ends, "at_end": bool(best in (values[0], values[-1]))}
        found.append((row, float(scale[here[0]]), draws))
    moves = _moves([(s, draws) for row, s, draws in found if not row["at_end"]], level)
    along = "width" if WIDTH in frame else "N"
    about = {"group": dict(points.group), "metric": points.metric, "kind": points.kind, "unit": top.unit}
    return {**about, "setting": points.mixed[0], "sizes": [row for row, *_ in found], "along": along, "moves": moves}


def _by_value(setting: Array, y: Array, error: Array) -> tuple[Array, Array, Array]:
    """Distinct values, the mean over their seeds, and its error: of evaluation, or of the seeds where that is more."""
    values, which = np.unique(setting, return_inverse=True)
    counts = np.bincount(which)
    mean = np.bincount(which, y) / counts
    drawn = np.sqrt(np.bincount(which, error**2)) / counts
    spread = np.bincount(which, (y - mean[which]) ** 2)
    among = np.sqrt(spread / np.maximum(counts - 1, 1) / counts)
    return values, mean, np.maximum(drawn, among)


def _drawn(y: Array, error: Array, kind: str, rng: np.random.Generator) -> Array:
    """What is best where it is least: the measured row and DRAWS of what it might have been, (1 + DRAWS, values)."""
    t, width = (-y, error) if kind == "score" else (np.log(y), error / y)
    return np.vstack([t, t + width * rng.normal(size=(DRAWS, len(t)))])


def _vertices(values: Array, t: Array) -> Array:
    """The best place (rows,) of each row of t: the parabola's through the least value, or an end where that is one."""
    x, rows = np.log(values), np.arange(len(t))
    least = t.argmin(1)
    k = np.clip(least, 1, len(x) - 2)
    left, middle, right = (t[rows, k + step] for step in (-1, 0, 1))
    before, after = x[k] - x[k - 1], x[k + 1] - x[k]
    falls, rises = (middle - left) / before, (right - middle) / after
    bend = np.where(rises > falls, (rises - falls) / (before + after), 1.0)
    vertex = x[k] - (falls * after + rises * before) / (before + after) / (2 * bend)
    inside = least == k
    return np.where(inside, np.exp(np.where(inside, vertex, 0.0)), values[least])


def _moves(found: Sequence[tuple[float, Array]], level: float) -> list[float] | None:
    """The exponent of the best value along the sizes that have one inside, with its ends."""
    if len(found) < 2:
        return None
    x = np.log([scale for scale, _ in found])
    away = x - x.mean()
    if not away.any():
        return None
    slopes = away @ np.log(np.stack([draws for _, draws in found])) / (away @ away)
    return [float(slopes[0]), *map(float, np.quantile(slopes[1:], [(1 - level) / 2, (1 + level) / 2]))]
