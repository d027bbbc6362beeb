"""How an exponent moves with choices that are not the data's: objective, dropped rows and rungs, what N and C count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.fit import Fit, fit
from analysis.intervals import parameter_intervals
from analysis.laws import Array
from analysis.points import Points, run_names, select
from analysis.solver import Objective
from analysis.study import suited
from analysis.table import InvalidTable, Table, numbers

# what else may be called N: with and without embeddings and text
CONVENTIONS = {
    "body only": ("params_body",),
    "body and head": ("params_body", "params_head"),
    "without embeddings": ("params_text", "params_body", "params_head"),
}
# FLOPs of a parameter and token in training, forward and backward: Kaplan et al. 2020 (arXiv 2001.08361), 2.1
FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
Variant = tuple[str, Points | InvalidTable, Objective, str]


def _columns(points: Points, frame: pd.DataFrame, names: tuple[str, ...]) -> list[Array] | None:
    """The named columns at the points' rows; None unless all are there and known."""
    if not set(names) <= set(frame.columns):
        return None
    rows = frame[["_row", *names]].set_index("_row").loc[points.rows]
    values = [numbers(rows[name])[0] for name in names]
    return values if all(np.isfinite(v).all() for v in values) else None


def _parameter_conventions(points: Points, frame: pd.DataFrame) -> Iterator[tuple[str, Points]]:
    for name, parts in CONVENTIONS.items():
        found = _columns(points, frame, parts)
        if found is not None and (np.sum(found, axis=0) > 0).all():
            yield f"N = {name}", replace(points, n=np.sum(found, axis=0))


def _compute_conventions(points: Points, frame: pd.DataFrame) -> Iterator[tuple[str, Points]]:
    """C without the head's repeats, and the rule of thumb that counts neither head nor attention."""
    parts = _columns(points, frame, ("flops_per_image_body", "flops_per_image_head"))
    if parts is not None and (parts[0] > 0).all():
        yield "C = body only", replace(points, c=points.c * parts[0] / (parts[0] + parts[1]))
    known = _columns(points, frame, ("params_total", "tokens_seen"))
    if known is not None and (known[0] * known[1] > 0).all():
        yield "C = 6 N tokens", replace(points, c=FLOPS_PER_PARAMETER_AND_TOKEN * known[0] * known[1])


def _never_finished(table: Table, done: pd.DataFrame, left: pd.DataFrame) -> pd.DataFrame:
    """The rows left out of runs that have not finished since: an attempt before the one that did is not of use."""
    finished, failed = run_names(table, done), run_names(table, left)
    if finished is None or failed is None:
        return left
    known = set(finished.itertuples(index=False, name=None))
    return left.drop(failed.index[[run in known for run in failed.itertuples(index=False, name=None)]])


def _restored(base: Fit, table: Table) -> Iterator[Variant]:
    """With the group's rows that were left out as unfinished put back."""
    points = base.points
    done, left = table.frame, table.left_out
    for name, value in points.group.items():
        done, left = (rows.loc[rows[name].astype(str) == value] for rows in (done, left))
    left = _never_finished(table, done, left) if len(left) else left
    if not len(left):
        return
    try:
        found, _ = select(table, points.group, pd.concat([done, left]), points.metric, points.kind)
    except InvalidTable as error:
        yield "with unfinished runs", error, base.objective, "what was left out for its status cannot be put back"
        return
    back = suited(base.law, found)
    count = int(np.isin(back.rows, left["_row"]).sum())
    if count:
        moved = "" if set(back.d) == set(points.d) else ", which changes the data sizes that all models have"
        reason = f"what was left out for its status, put back{moved}"
        yield f"with {count} unfinished runs", back, base.objective, reason


def _variants(base: Fit, table: Table) -> Iterator[Variant]:
    """(name, points, objective, reason) of every alternative to `base`."""
    points, sizes = base.points, np.unique(base.points.rung)
    second = Objective("lse-log") if base.objective.robust else Objective("huber-log")
    yield f"objective {second.name}", points, second, "a second objective"
    yield from _restored(base, table)
    for name, keep in (
        ("without the smallest size", points.rung > sizes[0]),
        ("without the largest size", points.rung < sizes[-1]),
    ):
        yield name, points.take(keep), base.objective, "one rung dropped, to see what it carries"
    counted = _parameter_conventions if "n" in base.law.axes else _compute_conventions
    for name, recounted in counted(points, table.frame):
        yield name, recounted, base.objective, "another counting convention"


def sensitivity(base: Fit, table: Table, level: float) -> list[dict[str, Any]]:
    """One row a choice with the exponents it gives; the first row is the fit as reported."""
    if not base.objective.logarithmic:
        return []
    floor = base.parameter("E").value if base.frozen.any() else None
    rows = [_row("as reported", base, "", level)]
    for label, points, objective, reason in _variants(base, table):
        try:
            if isinstance(points, InvalidTable):
                raise points
            fitted = fit(base.law, points, objective, floor, thorough=False, seeds=base.seeds)
            rows.append(_row(label, fitted, reason, level))
        except InvalidTable as error:
            rows.append({"choice": label, "reason": reason, "code": error.code})
    shared = {"group": dict(base.points.group), "metric": base.points.metric, "law": base.law.name}
    return [{**shared, "axes": list(base.law.axes), **row} for row in rows]


def _row(label: str, fitted: Fit, reason: str, level: float) -> dict[str, Any]:
    intervals = parameter_intervals(fitted, level)
    exponents = [p for p in fitted.public() if p.name in ("alpha", "beta")]
    return {
        "choice": label, "reason": reason, "n_runs": len(fitted.points),
        "exponents": {p.name: [p.value, *intervals[p.name]] for p in exponents},
    }  # fmt: skip
