"""Pre-registration: what the smaller rungs say of larger ones, written with the hash of the very rows it rests on.

The rows of the predicted rungs are cut away before anything is fitted, so the order in which runs finish does not
matter; the hash lets anyone check that. Predictions are never rewritten, and scored once, by the first table that holds
what they speak of: the file is a record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

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

    `points` of a law along one axis end at the ladder's data (`Points.within_ladder`); `planned` holds {"n", "d", "c"}
    of runs that have not finished. Entries carry no measurement yet.
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
                "group": dict(points.group), "metric": points.metric, "unit": points.unit,
                "protocol": points.protocol, "law": fitted.law.name,
                "rows_sha256": rows_sha256(fitted.points), "n_rows": len(fitted.points), "target": target,
                "predicted": said.mean, "interval": [said.run_low, said.run_high], "level": level,
                "decades": said.decades, "measured": None, "covered": None,
            })  # fmt: skip
    return out


def _sizes(target: dict[str, float]) -> list[str]:
    """The axes that name a run: its size and data size where they are known."""
    return [axis for axis in ("n", "d") if axis in target] or list(target)


def _measure(entry: dict[str, Any], points: Sequence[Points], table: str, today: str) -> None:
    """Scores one entry where its target has been measured in its unit and protocol; several seeds count by their mean.

    `table` is the sha256 of the table that did it. What was scored stays as it is: a later table may be another sweep.
    """
    for p in points:
        if dict(p.group) != entry["group"] or p.metric != entry["metric"]:
            continue
        here = np.all([np.isclose(p.axis(a), entry["target"][a], rtol=1e-9) for a in _sizes(entry["target"])], axis=0)
        for name, labels in (("unit", p.units), ("protocol", p.protocols)):
            # records of older versions have no protocol
            here &= labels == entry[name] if name in entry else True
        if here.any():
            value = float(p.y[here].mean())
            low, high = entry["interval"]
            entry |= {"measured": value, "covered": bool(low <= value <= high), "scored_at": today, "scored_by": table}
            return


def _counted(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One scored prediction a target: the latest of those made before the target was first scored.

    Predictions of one run from ever more rows share its one measurement.
    """
    targets: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        place = {axis: entry["target"][axis] for axis in _sizes(entry["target"])}
        what = [entry["group"], entry["metric"], entry.get("unit"), entry.get("protocol"), place]
        targets.setdefault(json.dumps(what, sort_keys=True), []).append(entry)
    out = []
    for same in targets.values():
        first = min(e["scored_at"] for e in same)
        out.append(max((e for e in same if e["made_at"] <= first), key=lambda e: e["made_at"]))
    return out


def history(counted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Day by day: targets scored, covered, predicted in advance of that day, and the share covered so far.

    Without an interval of that share: the targets of one sweep share their models, and are not independent.
    """
    out, hits, count = [], 0, 0
    for date in sorted({e["scored_at"][:10] for e in counted}):
        today = [e for e in counted if e["scored_at"][:10] == date]
        hits, count = hits + sum(e["covered"] for e in today), count + len(today)
        out.append({
            "date": date, "scored": len(today), "covered": sum(e["covered"] for e in today),
            "in_advance": sum(e["made_at"] < e["scored_at"] for e in today),
            "scored_so_far": count, "covered_so_far": hits,
        })  # fmt: skip
    return out


def keep_record(
    path: Path, entries: Sequence[dict[str, Any]], points: Sequence[Points], table: str, today: str | None = None
) -> dict[str, Any]:
    """Adds new entries to the record at `path`, scores what can be scored, writes it and returns it.

    A prediction that stands there already keeps its date and its numbers, and a score once given. `table` is the
    sha256 of the table that `points` are of; `today` is UTC, to the second; None: now.
    Raises InvalidTable for an unreadable record.
    """
    try:
        record = json.loads(path.read_text()) if path.exists() else {"predictions": []}
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
        else:
            _measure(entry, points, table, today)
    scored = [e for e in known.values() if e["covered"] is not None]
    counted = _counted(scored)
    level = scored[0]["level"] if scored else 0.95
    record = {
        "version": 2,
        "calibration": {
            "scored": len(scored),
            "targets": len(counted),
            "covered": sum(e["covered"] for e in counted),
            "level": level,
        },
        "history": plain(history(counted)),
        "predictions": list(known.values()),
    }
    write_json(path, record)
    return record
