"""How an exponent moves with choices that are not the data's: objective, dropped rungs, what counts as a parameter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.fit import Fit, fit
from analysis.intervals import parameter_intervals
from analysis.points import Points
from analysis.solver import Objective
from analysis.table import InvalidTable, numbers

# what else may be called N: with and without embeddings and text
CONVENTIONS = {
    "body only": ("params_body",),
    "body and head": ("params_body", "params_head"),
    "without embeddings": ("params_text", "params_body", "params_head"),
}


def _recounted(points: Points, frame: pd.DataFrame, parts: tuple[str, ...]) -> Points | None:
    if not set(parts) <= set(frame.columns):
        return None
    rows = frame.set_index("_row").loc[points.rows]
    n = np.sum([numbers(rows[part])[0] for part in parts], axis=0)
    return replace(points, n=n) if np.isfinite(n).all() and (n > 0).all() else None


def _variants(base: Fit, frame: pd.DataFrame) -> list[tuple[str, Points, Objective, str]]:
    """(name, points, objective, reason) of every alternative to `base`."""
    points, sizes = base.points, np.unique(base.points.n)
    second = Objective("lse-log") if base.objective.robust else Objective("huber-log")
    out = [(f"objective {second.name}", points, second, "a second objective")]
    for name, keep in (
        ("without the smallest size", points.n > sizes[0]),
        ("without the largest size", points.n < sizes[-1]),
    ):
        out.append((name, points.take(keep), base.objective, "one rung dropped, to see what it carries"))
    for name, parts in CONVENTIONS.items():
        recounted = _recounted(points, frame, parts)
        if recounted is not None and "n" in base.law.axes:
            out.append((f"N = {name}", recounted, base.objective, "another counting convention"))
    return out


def sensitivity(base: Fit, frame: pd.DataFrame, level: float) -> list[dict[str, Any]]:
    """One row a choice with the exponents it gives; the first row is the fit as reported."""
    if not base.objective.logarithmic:
        return []
    floor = base.parameter("E").value if base.frozen.any() else None
    rows = [_row("as reported", base, "", level)]
    for label, points, objective, reason in _variants(base, frame):
        try:
            rows.append(
                _row(label, fit(base.law, points, objective, floor, thorough=False, seeds=base.seeds), reason, level)
            )
        except InvalidTable as error:
            rows.append({"choice": label, "reason": reason, "code": error.code})
    return [
        {"group": dict(base.points.group), "metric": base.points.metric, "law": base.law.name, **row} for row in rows
    ]


def _row(label: str, fitted: Fit, reason: str, level: float) -> dict[str, Any]:
    intervals = parameter_intervals(fitted, level)
    exponents = [p for p in fitted.public() if p.name in ("alpha", "beta")]
    return {
        "choice": label, "reason": reason, "n_runs": len(fitted.points),
        "exponents": {p.name: [p.value, *intervals[p.name]] for p in exponents},
    }  # fmt: skip
