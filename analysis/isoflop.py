"""IsoFLOP profiles: at one budget, loss against size. A cross-check on the joint law, never the estimate.

On an asymmetric surface the parabola's vertex is off by .13 in log10 N where the direct fit is off by .005.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from analysis.distributions import two_sided
from analysis.laws import Array
from analysis.points import Points

# runs of one nominal budget differ by rounding to whole steps; budgets this far apart are different ones
SAME_BUDGET = 0.01
WIDEST_BUDGET = 0.02


def budgets(c: Array) -> list[np.ndarray]:
    """Indices of the runs of each budget: neighbours within SAME_BUDGET, never a chain wider than WIDEST_BUDGET."""
    order = np.argsort(c)
    sets: list[list[int]] = []
    for i in order:
        near = sets and np.log(c[i] / c[sets[-1][-1]]) < SAME_BUDGET and np.log(c[i] / c[sets[-1][0]]) < WIDEST_BUDGET
        if near:
            sets[-1].append(int(i))
        else:
            sets.append([int(i)])
    return [np.array(s) for s in sets]


def parabola(n: Array, y: Array, level: float) -> dict[str, Any]:
    """Quadratic of log y in log10 N: its vertex with an interval, or why there is none (code)."""
    x = np.log10(n)
    if len(np.unique(n)) < 4:
        return {"code": "TOO_FEW_SIZES", "message": f"{len(np.unique(n))} sizes; a profile needs 4"}
    centre = x.mean()
    design = np.stack([np.ones_like(x), x - centre, (x - centre) ** 2], axis=1)
    theta, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    if theta[2] <= 0:
        return {"code": "NOT_CONVEX", "message": "the profile has no minimum"}
    rest = np.log(y) - design @ theta
    dof = len(x) - 3
    covariance = np.linalg.inv(design.T @ design) * float(rest @ rest) / dof
    vertex = -theta[1] / (2 * theta[2])
    gradient = np.array([0.0, -1 / (2 * theta[2]), theta[1] / (2 * theta[2] ** 2)])
    half = two_sided(level, dof) * float(np.sqrt(gradient @ covariance @ gradient))
    out = {
        "n_star": float(10 ** (centre + vertex)),
        "interval": [float(10 ** (centre + vertex + s * half)) for s in (-1, 1)],
    }
    if not x.min() <= centre + vertex <= x.max():
        out |= {"code": "OUTSIDE", "message": "the vertex lies outside the swept sizes"}
    return out


def _along_data(points: Points) -> list[tuple[float, Array, Array]]:
    """Per size its (log C, log y) along data sizes, where there are three or more."""
    out = []
    for n in np.unique(points.n):
        here = points.take(points.n == n)
        order = np.argsort(here.c)
        if len(np.unique(here.d)) >= 3:
            out.append((float(n), np.log(here.c[order]), np.log(here.y[order])))
    return out


def _interpolated(points: Points) -> list[dict[str, Any]]:
    """Profiles at budgets inside several sizes' own ranges, each size's loss interpolated along its data sizes."""
    curves = _along_data(points)
    if len(curves) < 2:
        return []
    edges = sorted({float(v) for _, c, _ in curves for v in (c[0], c[-1])})
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    out = []
    for at in middles:
        inside = [(n, float(np.interp(at, c, y))) for n, c, y in curves if c[0] <= at <= c[-1]]
        if len(inside) >= 2:
            n, y = (np.array(v) for v in zip(*inside, strict=True))
            out.append({"c": float(np.exp(at)), "n": n, "y": np.exp(y), "interpolated": True})
    return out


def profiles(points: Points, level: float, joint: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """All profiles of one metric in one group, each with its vertex or the reason it has none.

    Runs at equal budgets are taken as they are; a grid of N x D is interpolated along D. `joint` is the allocation of
    the joint law, beside whose N* each vertex is set.
    """
    if points.kind not in ("loss", "distance") or not np.isfinite(points.c).all():
        return []
    exact = [s for s in budgets(points.c) if len(np.unique(points.n[s])) >= 3]
    found: Sequence[dict[str, Any]] = [
        {"c": float(np.exp(np.log(points.c[s]).mean())), "n": points.n[s], "y": points.y[s], "interpolated": False}
        for s in exact
    ] or _interpolated(points)
    out = []
    for profile in found:
        entry = {"group": dict(points.group), "metric": points.metric, "unit": points.unit, **profile}
        entry |= parabola(profile["n"], profile["y"], level)
        if joint:
            c, n = (np.log([b[k] for b in joint["budgets"]]) for k in ("c", "n"))
            entry["joint_n_star"] = float(np.exp(np.interp(np.log(profile["c"]), c, n)))
        out.append(entry)
    return out
