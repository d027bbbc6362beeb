"""What changed between two results: rows, laws and measured values, with intervals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from analysis.compare import contrast
from analysis.distributions import two_sided
from analysis.document import entry
from analysis.fit import Fit
from analysis.study import Study


def _key(fit: Fit) -> str:
    return json.dumps([dict(fit.points.group), fit.points.metric, fit.law.name, list(fit.law.axes)])


def _parameter_changes(a: Fit, b: Fit, level: float) -> list[dict[str, Any]]:
    """Exponents and slopes of b minus those of a; Welch's degrees of freedom."""
    out = []
    first, second = entry(a, level), entry(b, level)
    for name in ("alpha", "beta", "alpha_N", "alpha_D", "slope"):
        if name not in first["params"] or name not in second["params"]:
            continue
        quantile = [two_sided(level, f.within[1]) for f in (a, b)]
        halves = [(e["intervals"][name][1] - e["intervals"][name][0]) / 2 for e in (first, second)]
        errors = np.array(halves) / quantile
        if not (errors > 0).all():
            continue
        dof = float((errors**2).sum() ** 2 / sum(s**4 / f.within[1] for s, f in zip(errors, (a, b), strict=True)))
        half = two_sided(level, dof) * float(np.hypot(*errors))
        effect = second["params"][name] - first["params"][name]
        out.append({
            "group": dict(a.points.group), "metric": a.points.metric, "law": a.law.name, "axes": list(a.law.axes),
            "parameter": name, "before": first["params"][name], "after": second["params"][name], "change": effect,
            "interval": [effect - half, effect + half], "changed": abs(effect) > half,
        })  # fmt: skip
    return out


def _rows(a: Study, b: Study) -> dict[str, Any]:
    if "run_id" not in a.table.frame or "run_id" not in b.table.frame:
        return {"before": len(a.table.frame), "after": len(b.table.frame)}
    before, after = (set(s.table.frame["run_id"].astype(str)) for s in (a, b))
    return {"before": len(before), "after": len(after), "gone": sorted(before - after), "new": sorted(after - before)}


def changes(a: Study, b: Study, level: float) -> dict[str, Any]:
    """Laws that both results carry, metrics at the largest size, and runs gone or new. Units that differ are named."""
    laws = {_key(f): f for f in a.fits}
    parameters = [c for f in b.fits if _key(f) in laws for c in _parameter_changes(laws[_key(f)], f, level)]
    metrics, unlike = [], []
    fits = [{(f.points.metric, f.points.name): f for f in s.fits if f.law.axes == ("n",)} for s in (a, b)]
    for p in a.sound:
        for q in b.sound:
            if (p.metric, p.group) != (q.metric, q.group):
                continue
            if (p.unit, p.protocol) != (q.unit, q.protocol):
                unlike.append({"group": dict(p.group), "metric": p.metric, "before": p.unit, "after": q.unit})
                continue
            at = (p.metric, p.name)
            found = contrast(q, p, fits[1].get(at), fits[0].get(at), "largest", level)
            if found is not None:
                metrics.append({
                    "group": dict(p.group), "metric": p.metric, "at": "largest", "change": found.effect,
                    "interval": [found.low, found.high], "changed": found.sign != 0,
                    "scale": "difference" if p.kind in ("score", "signed") else "difference of logs",
                })  # fmt: skip
    return {
        "before": {"table": a.table.source, "sha256": a.table.sha256},
        "after": {"table": b.table.source, "sha256": b.table.sha256},
        "rows": _rows(a, b), "parameters": parameters, "metrics": metrics, "unlike": unlike,
    }  # fmt: skip


def in_words(found: dict[str, Any]) -> str:
    """One line a change; what did not change is counted."""
    rows = found["rows"]
    lines = [
        f"{rows['before']} -> {rows['after']} rows, {len(rows.get('new', []))} new, {len(rows.get('gone', []))} gone"
    ]
    for c in found["parameters"]:
        if c["changed"]:
            low, high = c["interval"]
            name = "-".join(c["group"].values()) or "all"
            moved = f"{c['before']:.4f} -> {c['after']:.4f} ({c['change']:+.4f} [{low:+.4f}, {high:+.4f}])"
            lines.append(f"{name} {c['metric']} {c['law']} {c['parameter']}: {moved}")
    for m in found["metrics"]:
        if m["changed"]:
            low, high = m["interval"]
            name = "-".join(m["group"].values()) or "all"
            lines.append(
                f"{name} {m['metric']} at the largest size: {m['change']:+.4f} [{low:+.4f}, {high:+.4f}] ({m['scale']})"
            )
    same = sum(not c["changed"] for c in found["parameters"] + found["metrics"])
    lines.append(f"{same} laws' parameters and values did not change beyond their intervals")
    lines += [f"{u['metric']}: units differ ({u['before']} / {u['after']}), not compared" for u in found["unlike"]]
    return "\n".join(lines)
