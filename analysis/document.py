"""laws.json: every number the report prints, at full precision, with where it came from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from analysis.bootstrap import intervals
from analysis.fit import EXPONENTS, Fit
from analysis.intervals import allocation_exponent, band, predict
from analysis.points import Points
from analysis.study import Study

VERSION = 1
# no headline exponent with a wider half-width: the data do not carry it
HEADLINE_HALF_WIDTH = 0.1
CURVE_POINTS = 60


@cache
def code_version() -> str:
    """A hash of the modules that computed the numbers; a git revision would not see local edits."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:12]


def plain(value: Any) -> Any:
    """Numpy to JSON; non-finite floats become None, since JSON has none."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (np.integer, int)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def write(path: Path, text: str | bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(text.encode() if isinstance(text, str) else text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, document: Any) -> None:
    write(path, json.dumps(plain(document), indent=1, allow_nan=False) + "\n")


def _curve(fit: Fit) -> dict[str, Any] | None:
    """The law with its bands from half a decade below the data to one decade above it, for one-axis laws."""
    if fit.law.axes[1:]:
        return None
    values = fit.points.axis(fit.law.axes[0])
    x = np.geomspace(values.min() / 10**0.25, values.max() * 10, CURVE_POINTS)
    names = ("mean", "low", "high", "run_low", "run_high")
    return {"x": x, **dict(zip(names, band(fit, **{fit.law.axes[0]: x}), strict=True))}


def _slices(fit: Fit) -> list[dict[str, Any]]:
    """A joint law along N at each data size of the ladder."""
    if fit.law.axes != ("n", "d"):
        return []
    x = np.geomspace(fit.points.n.min() / 10**0.25, fit.points.n.max() * 10, CURVE_POINTS)
    levels = np.unique(fit.points.d)
    levels = levels[np.linspace(0, len(levels) - 1, min(len(levels), 6)).astype(int)]
    return [{"d": d, "x": x, "mean": fit.predict(n=x, d=d)} for d in levels]


def _forecasts(fit: Fit, result: Study) -> list[dict[str, Any]]:
    """The law at the places that were asked for, where they name all of its axes."""
    out = []
    for place in result.choice.predict:
        if set(fit.law.axes) <= set(place):
            said = predict(fit, result.choice.level, **{axis: place[axis] for axis in fit.law.axes})
            out.append({"at": {axis: place[axis] for axis in fit.law.axes}, "n_runs": len(fit.points), **said.__dict__})
    return out


def half_widths(intervals: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Half-widths of the exponents' intervals."""
    return {name: (high - low) / 2 for name, (low, high) in intervals.items() if name in EXPONENTS}


def entry(fit: Fit, level: float, method: str = "gauss-newton-t") -> dict[str, Any]:
    """One fit as laws.json holds it. Raises InvalidTable where the method does not suit the objective."""
    points = fit.points
    found = intervals(fit, method, level)
    widths = half_widths(found)
    carried = [name for name, half in widths.items() if half <= HEADLINE_HALF_WIDTH] if fit.headline else []
    allocation = allocation_exponent(fit, level)
    fixed = (
        {p.name: p.value for p in fit.public() if p.name == "E" and fit.frozen[0]} if fit.law.name != "logit" else {}
    )
    return {
        "group": dict(points.group),
        "metric": points.metric,
        "unit": points.unit,
        "protocol": points.protocol,
        "law": fit.law.name,
        "axes": list(fit.law.axes),
        "objective": {"name": fit.objective.name, "delta": fit.objective.delta, "value": fit.value},
        "params": {p.name: p.value for p in fit.public()},
        "fixed": fixed,
        "intervals": {"method": method, "level": level, **found},
        "half_widths": widths,
        "headline": carried,
        "allocation_exponent": allocation,
        "n_runs": len(points),
        "n_clusters": len(np.unique(points.cluster)),
        "dof": fit.within[1],
        "noise": {"within_variance": fit.within[0], "between_variance": fit.between[0], "between_dof": fit.between[1],
                  "seeds": {"within": fit.seeds.within, "between": fit.seeds.between, "dof": fit.seeds.dof}},
        "starts": {"n": fit.starts, "share_at_best": fit.share_at_best, "projection_gap": fit.projection_gap},
        "aicc": fit.aicc,
        "rollout": [],
        "warnings": [{"code": w.code, "message": w.message, "blocks": w.blocks} for w in fit.warnings],
        "internal": {
            "parameters": list(fit.law.parameters), "theta": fit.theta, "covariance": fit.covariance,
            "center": fit.center, "scale": fit.scale,
        },
        "points": {
            "row": points.rows, "n": points.n, "d": points.d, "c": points.c, "y": points.y, "se": points.se,
            "fitted": fit.predict(**{a: points.axis(a) for a in fit.law.axes}), "residual": fit.residual,
        },
        "curve": _curve(fit),
        "slices": _slices(fit),
    }  # fmt: skip


def measurement(points: Points, sizes: dict[int, str]) -> dict[str, Any]:
    """The raw points of a metric in a group, with the sizes' names."""
    return {
        "group": dict(points.group), "metric": points.metric, "kind": points.kind, "unit": points.unit,
        "protocol": points.protocol, "floor": points.floor, "real_floor": points.real_floor, "ceiling": points.ceiling,
        "row": points.rows, "n": points.n, "d": points.d, "c": points.c, "y": points.y, "se": points.se,
        "size": [sizes.get(int(r), "") for r in points.rows], "rung_axis": points.rung_axis,
        "largest": np.isin(points.rows, points.ladder().rows),
    }  # fmt: skip


def _sweep(result: Study) -> str:
    names = result.table.frame["sweep"].astype(str).unique() if "sweep" in result.table.frame else []
    return names[0] if len(names) == 1 else ""


def document(result: Study) -> dict[str, Any]:
    """The whole of laws.json, short of what the later stages add (comparisons, allocation, links, verdicts)."""
    table, frame = result.table, result.table.frame
    sizes = dict(zip(frame["_row"].astype(int), frame["size"].astype(str), strict=True)) if "size" in frame else {}
    measured = {(p.metric, p.name): len(p) for p in result.points}
    blanks = {f"{metric} in {name}": len(frame) - n for (metric, name), n in measured.items() if len(measured) == 1}
    return {
        "version": VERSION,
        "code_version": code_version(),
        "table": {
            "source": Path(table.source).name, "sha256": table.sha256, "n_rows": table.n_rows, "n_used": len(frame),
            "columns": {k: v for k, v in asdict(table.columns).items() if k != "group"},
            "group": list(table.columns.group),
            "excluded": list(result.excluded), "not_measured": blanks,
        },
        "sweep": _sweep(result),
        "headline_metric": result.points[0].metric,
        "level": result.choice.level,
        "choice": asdict(result.choice),
        "fits": [
            entry(f, result.choice.level, result.choice.interval) | {"forecasts": _forecasts(f, result)}
            for f in result.fits
        ],
        "refused": list(result.refused),
        "measurements": [measurement(p, sizes) for p in result.points],
    }  # fmt: skip
