"""Where a metric is best along one setting that was varied at every size, and how the best value moves with size.

A parabola through the best value and its neighbours, in the logs (scores as they are), as rates are tuned by hand.
Asked of groups whose runs differ in one positive number alone, other numbers at each size, as a rate does that follows
the width: where all sizes share their values, each value is a group of its own, with laws and contrasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Curve:
    """One size: the values tried (k,), the metric's mean there and its error (k,), and where it is best.

    `draws` holds the best value as measured, then as it might have been: (1 + DRAWS,).
    """

    n: float
    size: str
    scale: float
    values: Array
    y: Array
    error: Array
    draws: Array

    def row(self, level: float) -> dict[str, Any]:
        """For laws.json. An end of the interval is None where it lies at or beyond what was tried."""
        first, last = self.values[0], self.values[-1]
        best, (low, high) = float(self.draws[0]), _ends(self.draws, level)
        found = {"n": self.n, "size": self.size, "values": self.values, "y": self.y, "error": self.error, "best": best}
        ends = [low if low > first else None, high if high < last else None]
        return {**found, "interval": ends, "at_end": bool(best in (first, last))}


def optima(points: Sequence[Points], frame: pd.DataFrame, level: float) -> list[dict[str, Any]]:
    """Of each group and metric, at its largest data size, the best value of the setting by size and how it moves.

    `frame` are the table's rows. A likelihood bound, whose log means nothing, is left out; so are sizes with fewer than
    VALUES values.
    """
    rows = (_optimum(p, frame, level) for p in points if len(p.mixed) == 1 and p.kind != "signed")
    return [row for row in rows if row is not None]


def _optimum(points: Points, frame: pd.DataFrame, level: float) -> dict[str, Any] | None:
    top, by_row = points.largest_data(), frame.set_index("_row")
    setting = numbers(by_row.loc[top.rows, points.mixed[0]])[0]
    if not (setting > 0).all() or not np.isfinite([top.error, top.n]).all():
        return None
    width = numbers(by_row.loc[top.rows, WIDTH])[0] if WIDTH in frame else top.n
    along, scale = ("width", width) if WIDTH in frame and np.isfinite(width).all() else ("N", top.n)
    rng, sizes = np.random.default_rng(0), _sizes(top)
    noise = _noise(top, setting, sizes)
    curves = []
    for here in sizes:
        values, y, error = _by_value(setting[here], top, here, noise[0])
        if len(values) < VALUES or np.ptp(y) == 0:
            continue
        draws = _best(values, _drawn(y, error, points.kind, noise[1], rng))
        first = here[0]
        name = top.sizes.get(int(top.rows[first]), "")
        curves.append(_Curve(float(top.n[first]), name, float(scale[first]), values, y, error, draws))
    if not curves:
        return None
    about = {"group": dict(points.group), "metric": points.metric, "kind": points.kind, "unit": top.unit}
    found = {"setting": points.mixed[0], "sizes": [c.row(level) for c in curves], "along": along}
    return {**about, **found, "moves": _moves(curves, level)}


def _sizes(points: Points) -> list[np.ndarray]:
    """The points of each size, small to large; by name where sizes have one, since a setting may add parameters."""
    names = [points.sizes.get(int(row)) or f"{n:.17g}" for row, n in zip(points.rows, points.n, strict=True)]
    which = np.unique(names, return_inverse=True)[1]
    parts = [np.flatnonzero(which == k) for k in range(which.max() + 1)]
    return sorted(parts, key=lambda here: float(points.n[here].mean()))


def _noise(points: Points, setting: Array, sizes: Sequence[np.ndarray]) -> tuple[float, float]:
    """Variance of runs around the mean of their size and value, relative unless a score's, and its dof, or 0 and 0."""
    t = points.y if points.kind == "score" else np.log(points.y)
    squares, dof = 0.0, 0
    for here in sizes:
        which = np.unique(setting[here], return_inverse=True)[1]
        means = np.bincount(which, t[here]) / np.bincount(which)
        squares += float(((t[here] - means[which]) ** 2).sum())
        dof += len(here) - len(means)
    return (squares / dof if dof else 0.0), float(dof)


def _by_value(setting: Array, points: Points, here: np.ndarray, noise: float) -> tuple[Array, Array, Array]:
    """Distinct values, the mean over their seeds and its error (k,): of evaluation, or of seeds where that is more."""
    y = points.y[here]
    values, which = np.unique(setting, return_inverse=True)
    counts = np.bincount(which)
    mean = np.bincount(which, y) / counts
    drawn = np.sqrt(np.bincount(which, points.error[here] ** 2)) / counts
    among = np.sqrt(noise / counts) * (1.0 if points.kind == "score" else mean)
    return values, mean, np.maximum(drawn, among)


def _drawn(y: Array, error: Array, kind: str, dof: float, rng: np.random.Generator) -> Array:
    """What is best where it is least: as measured, and DRAWS of what it might have been, (1 + DRAWS, k).

    One variance of few replicates serves all values: draws are of Student's t with its dof.
    """
    t, width = (-y, error) if kind == "score" else (np.log(y), error / y)
    few = np.sqrt(dof / rng.chisquare(dof, size=(DRAWS, 1))) if dof else 1.0
    return np.vstack([t, t + width * few * rng.normal(size=(DRAWS, len(t)))])


def _best(values: Array, t: Array) -> Array:
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


def _moves(curves: Sequence[_Curve], level: float) -> list[float] | None:
    """The exponent of the best value along the sizes that have one inside, with its ends."""
    inside = [c for c in curves if c.values[0] < c.draws[0] < c.values[-1]]
    x = np.log([c.scale for c in inside])
    if len(inside) < 2 or np.ptp(x) == 0:
        return None
    away = x - x.mean()
    slopes = away @ np.log(np.stack([c.draws for c in inside])) / (away @ away)
    return [float(slopes[0]), *_ends(slopes, level)]


def _ends(draws: Array, level: float) -> list[float]:
    """The interval of what was drawn around the first one."""
    return [float(v) for v in np.quantile(draws[1:], [(1 - level) / 2, (1 + level) / 2])]
