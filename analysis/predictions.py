"""Pre-registration: what the smaller rungs say of larger ones, written with the hash of the very rows it rests on.

The rows of the predicted rungs are cut away before anything is fitted, so the order in which runs finish does not
matter; the hash lets anyone check that. Old predictions are never rewritten, only scored: the file is a record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from analysis.distributions import normal_quantile
from analysis.document import plain, write_json
from analysis.intervals import predict
from analysis.points import Points
from analysis.rollout import Refit, rungs
from analysis.table import AXES, InvalidTable


def rows_sha256(points: Points) -> str:
    """The identity of the rows a prediction used: their axes and values at full precision, in a canonical order."""
    rows = sorted(zip(*(np.nan_to_num(v).tolist() for v in (points.n, points.d, points.c, points.y)), strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _key(entry: dict[str, Any]) -> str:
    names = ("group", "metric", "law", "rows_sha256", "target")
    return json.dumps([entry[name] for name in names], sort_keys=True)


def register(
    points: Points, refit: Refit, level: float, planned: Sequence[dict[str, float]] = ()
) -> list[dict[str, Any]]:
    """Predictions for the largest rung from all others, and for planned runs above the measured ones.

    `planned` holds {"n", "d", "c"} of runs that have not finished. Entries carry no measurement yet.
    """
    sizes = rungs(points)
    if len(sizes) < 2:
        return []
    top = points.ladder()
    last = top.take(top.rung == sizes[-1])
    places = [{axis: float(last.axis(axis)[0]) for axis in AXES if np.isfinite(last.axis(axis)[0])}]
    jobs = [(points.take(points.rung < sizes[-1]), places)]
    jobs.append((points, [dict(p) for p in planned if p[points.rung_axis] > sizes[-1]]))
    out = []
    for used, targets in jobs:
        if not targets:
            continue
        try:
            fitted = refit(used)
        except InvalidTable:
            continue
        for target in targets:
            said = predict(fitted, level, **{axis: target[axis] for axis in fitted.law.axes})
            out.append({
                "group": dict(points.group), "metric": points.metric, "unit": points.unit, "law": fitted.law.name,
                "rows_sha256": rows_sha256(fitted.points), "n_rows": len(fitted.points), "target": target,
                "predicted": said.mean, "interval": [said.run_low, said.run_high], "level": level,
                "decades": said.decades, "measured": None, "covered": None,
            })  # fmt: skip
    return out


def _measure(entry: dict[str, Any], points: Sequence[Points], today: str) -> None:
    """Scores one entry where its target has been measured; several seeds count by their mean. The first date stays."""
    for p in points:
        if dict(p.group) != entry["group"] or p.metric != entry["metric"]:
            continue
        sizes = [axis for axis in ("n", "d") if axis in entry["target"]] or list(entry["target"])
        here = np.all([np.isclose(p.axis(a), entry["target"][a], rtol=1e-9) for a in sizes], axis=0)
        if here.any():
            value = float(p.y[here].mean())
            low, high = entry["interval"]
            entry |= {"measured": value, "covered": bool(low <= value <= high)}
            entry.setdefault("scored_at", today)


def wilson(hits: int, count: int, level: float) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): it stays inside [0, 1] and is not empty at 0 or all."""
    z = normal_quantile(0.5 + level / 2)
    share, bound = hits / count, 1 + z * z / count
    middle = share + z * z / (2 * count)
    half = z * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count**2)))
    return (middle - half) / bound, (middle + half) / bound


def history(entries: Sequence[dict[str, Any]], level: float) -> list[dict[str, Any]]:
    """Day by day: predictions scored, covered, made in advance of that day, and the share covered so far."""
    scored = [e for e in entries if e["covered"] is not None]
    out, hits, count = [], 0, 0
    for date in sorted({e["scored_at"][:10] for e in scored}):
        today = [e for e in scored if e["scored_at"][:10] == date]
        hits, count = hits + sum(e["covered"] for e in today), count + len(today)
        out.append({
            "date": date, "scored": len(today), "covered": sum(e["covered"] for e in today),
            "in_advance": sum(e["made_at"] < e["scored_at"] for e in today),
            "scored_so_far": count, "covered_so_far": hits, "interval": wilson(hits, count, level),
        })  # fmt: skip
    return out


def keep_record(
    path: Path, entries: Sequence[dict[str, Any]], points: Sequence[Points], today: str | None = None
) -> dict[str, Any]:
    """Adds new entries to the record at `path`, scores what can be scored, writes it and returns it.

    A prediction that stands there already keeps its date and its numbers. `today` is UTC, to the second; None: now.
    Raises InvalidTable for an unreadable record.
    """
    try:
        record = json.loads(path.read_text()) if path.exists() else {"version": 1, "predictions": []}
        known = {_key(e): e for e in record["predictions"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidTable(
            "UNREADABLE_RECORD", f"{path} is no record of predictions: move it away ({error})"
        ) from error
    today = today or datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    for entry in plain(list(entries)):
        known.setdefault(_key(entry), {**entry, "made_at": today})
    for entry in known.values():
        if entry["covered"] is not None:
            # from before this date was kept: nothing says that it was made in advance
            entry.setdefault("scored_at", entry["made_at"])
        _measure(entry, points, today)
    scored = [e for e in known.values() if e["covered"] is not None]
    level = scored[0]["level"] if scored else 0.95
    record = {
        "version": 1,
        "calibration": {"scored": len(scored), "covered": sum(e["covered"] for e in scored), "level": level},
        "history": plain(history(scored, level)),
        "predictions": list(known.values()),
    }
    write_json(path, record)
    return record
