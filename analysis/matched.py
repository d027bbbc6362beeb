"""Arms matched in images, in parameters and in training FLOPs; as measured, and net of what their tokenizers set.

One rung of the ladder is the same stack for every arm, but not the same size: a head and a vocabulary count, and a step
costs more where a token is denoised. So each pair is compared three times: on its largest common rung and data size
(runs against runs), at the most parameters and at the most FLOPs that both have measured (law against law). A tokenizer
bounds what a model can reach: net, a distance has its reconstruction floor subtracted and a score is a share of its
ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from analysis.compare import along_one_axis
from analysis.crossings import DRAWS, curves, draw
from analysis.fit import Fit
from analysis.laws import Array
from analysis.points import Points, comparable
from analysis.table import is_part

# What a pair may have in common beside the rung, by the axis of the laws that are asked.
MATCHED = {"n": "parameters", "c": "training FLOPs"}


def _net(values: Array, points: Points) -> Array | None:
    """Values without what the arm's tokenizer sets; None where that is not measured."""
    if points.kind == "distance" and points.floor is not None:
        return values - points.floor
    if points.kind == "score" and points.ceiling:
        return values / points.ceiling
    return None


def _differences(a: Array | None, b: Array | None, kind: str) -> Array | None:
    """a - b in a contrast's scale: of logs, but for scores and signed metrics. None where a first value has no log."""
    if a is None or b is None or (kind not in ("score", "signed") and min(a[0], b[0]) <= 0):
        return None
    if kind in ("score", "signed"):
        return a - b
    # A draw below a floor is as far below as can be said.
    return np.subtract(*(np.log(np.maximum(v, np.finfo(float).tiny)) for v in (a, b)))


def _interval(differences: Array | None, level: float) -> list[float] | None:
    """[effect, low, high] from the difference of the fits (first) and those of their draws."""
    if differences is None:
        return None
    tail = 50 * (1 - level)
    return [float(differences[0]), *(float(v) for v in np.percentile(differences[1:], [tail, 100 - tail]))]


def matched_laws(a: Fit, b: Fit, level: float, rng: np.random.Generator) -> dict[str, Any] | None:
    """Two laws along one axis where both arms have been measured farthest; None for what may not be subtracted."""
    if not comparable(a.points, b.points):
        return None
    axis = a.law.axes[0]
    at = np.array([min(float(f.points.axis(axis).max()) for f in (a, b))])
    of_a, of_b = (curves(f, np.vstack([f.theta, draw(f, DRAWS, rng)]), at)[:, 0] for f in (a, b))
    kind, nets = a.points.kind, (_net(of_a, a.points), _net(of_b, b.points))
    return {
        "metric": a.points.metric, "a": a.points.name, "b": b.points.name, "matched": MATCHED[axis],
        "at": float(at[0]), "values": [float(of_a[0]), float(of_b[0])],
        "effect": _interval(_differences(of_a, of_b, kind), level),
        "net_effect": _interval(_differences(*nets, kind), level),
    }  # fmt: skip


def _net_of_runs(width: float, sides: Sequence[Points]) -> list[float] | None:
    """A contrast of runs net of the tokenizers; its interval's `width` is stretched as the more bounded arm's."""
    values = [np.array([p.y.mean()]) for p in sides]
    nets = [n for v, p in zip(values, sides, strict=True) if (n := _net(v, p)) is not None]
    differences = _differences(nets[0], nets[1], sides[0].kind) if len(nets) == 2 else None
    if differences is None:
        return None
    effect = float(differences[0])
    if sides[0].kind == "score":
        stretch = 1 / min(p.ceiling or 1.0 for p in sides)
    else:
        # d log(y - floor) / d log y
        stretch = max(float(v[0] / n[0]) for v, n in zip(values, nets, strict=True))
    return [effect, effect - stretch * width / 2, effect + stretch * width / 2]


def matched_runs(contrast: Mapping[str, Any], points: Mapping[tuple[str, str], Points]) -> dict[str, Any]:
    """A contrast at the largest rung and data size of both arms, and what its runs are net of their tokenizers."""
    metric = contrast["metric"]
    sides = [points[metric, contrast[side]] for side in ("a", "b")]
    sides = [p.take(np.isin(p.rows, contrast["rows"])) for p in sides]
    return {
        "metric": metric, "a": contrast["a"], "b": contrast["b"], "matched": "images", "at": float(sides[0].d.max()),
        "values": [float(p.y.mean()) for p in sides], "effect": [contrast[key] for key in ("effect", "low", "high")],
        "net_effect": _net_of_runs(contrast["high"] - contrast["low"], sides),
    }  # fmt: skip


def matched(
    points: Sequence[Points], fits: Sequence[Fit], contrasts: Sequence[Mapping[str, Any]], level: float
) -> list[dict[str, Any]]:
    """Every pair of arms of one unit on its three footings; parts of a score are left to the contrasts."""
    named = {(p.metric, p.name): p for p in points}
    rows: list[dict[str, Any] | None] = [
        matched_runs(c, named) for c in contrasts if c["at"] == "largest" and not is_part(c["metric"])
    ]
    for axis in MATCHED:
        along = [f for f in along_one_axis(fits) if f.law.axes == (axis,) and not is_part(f.points.metric)]
        rows += [matched_laws(a, b, level, np.random.default_rng(0)) for a, b in combinations(along, 2)]
    return sorted((r for r in rows if r), key=lambda r: (r["metric"], r["a"], r["b"]))
