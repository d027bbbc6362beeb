"""From a study to the whole of laws.json: rollouts, law choice, comparisons, links, allocation, verdicts, curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.allocation import allocation
from analysis.compare import comparisons
from analysis.composition import composition
from analysis.curves import learning_curves
from analysis.distributions import slope
from analysis.document import document
from analysis.fit import Fit
from analysis.isoflop import profiles
from analysis.laws import Law, law
from analysis.links import ceiling_band, link
from analysis.matched import matched
from analysis.noise import pooled, seed_noise, unlike
from analysis.optima import optima
from analysis.points import Points, data_levels
from analysis.predictions import keep_record, register
from analysis.rollout import Refit, on_common_rows, rollout, score
from analysis.sensitivity import sensitivity
from analysis.study import Choice, Study, fit_one
from analysis.table import InvalidTable, is_part
from analysis.verdicts import verdicts

# the broken law has five parameters: fewer rungs cannot tell its break from noise
RUNGS_FOR_A_BREAK = 7


class Refits:
    """Fits of held-out tests: each law and set of rows once, without the slower cross-check of the optimum.

    Rollouts, chained links and predictions on record ask for the same ones.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.known: dict[tuple[Any, ...], Fit | InvalidTable] = {}

    def of(self, chosen: Law) -> Refit:
        """The same law, floor and objective on other points."""
        return lambda points: self._fit(chosen, points)

    def _fit(self, chosen: Law, points: Points) -> Fit:
        key = (chosen, points.metric, points.name, *(v.tobytes() for v in (points.rows, points.rung, points.y)))
        if key not in self.known:
            try:
                self.known[key] = fit_one(chosen, points, self.choice, thorough=False)
            except InvalidTable as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, InvalidTable):
            raise found
        return found


def _candidates(points: Points, fits: Sequence[Fit]) -> list[Law]:
    """The laws that suit the metric, along the ladder and over N and D, and whatever else was fitted."""
    axis, signed = points.rung_axis, points.kind == "signed"
    two = np.isfinite(points.n).all() and np.isfinite(points.d).all()
    if points.kind == "score":
        out = [law("logit", axis), *([law("logit-joint")] if two else [])]
    else:
        out = [*([] if signed else [law("power", axis)]), law("power-floor", axis, signed_floor=signed)]
        if not signed and len(np.unique(points.rung)) >= RUNGS_FOR_A_BREAK:
            out.append(law("broken", axis))
        out += [law("chinchilla", signed_floor=signed)] if two else []
        out += [law("kaplan"), law("kaplan-floor")] if two and points.kind == "loss" else []
    return list(dict.fromkeys([*out, *(f.law for f in fits)]))


def _held(chosen: Law, points: Points) -> Points:
    """The points that a held-out test cuts at a size: what it shows the law, and what it asks it."""
    return points.within_ladder() if len(chosen.axes) == 1 else points


def _law_choice(
    result: Study, points: Points, refits: Refits, rollouts: dict[tuple[str, ...], list[dict]]
) -> list[dict[str, Any]]:
    """Every candidate's held-out error, coverage and AICc; `chosen` marks the least error on rows that all were asked.

    `common` is a candidate's score on those; a law that was asked of too few rungs is no rival, and narrows nothing.
    """
    rows, asked, level = [], [], result.choice.level
    mine = {f.law: f for f in result.fits if (f.points.metric, f.points.name) == (points.metric, points.name)}
    for candidate in _candidates(points, list(mine.values())):
        try:
            fitted = mine.get(candidate) or refits.of(candidate)(points)
        except InvalidTable as error:
            rows.append({"law": candidate.name, "axes": list(candidate.axes), "code": error.code})
            continue
        key = (points.metric, points.name, candidate.name, *candidate.axes)
        rollouts[key] = rollout(_held(candidate, points), refits.of(candidate), level)
        shape = {"law": candidate.name, "axes": list(candidate.axes), "n_runs": len(fitted.points), "aicc": fitted.aicc}
        rows.append(shape | {"rollout": score(rollouts[key])})
        asked.append((rows[-1], rollouts[key]))
    shared = on_common_rows([entries for _, entries in asked], points.rung_axis)
    for (row, _), common in zip(asked, shared, strict=True):
        row["common"] = common
    judged = [r for r in rows if r.get("common")]
    best = min(judged, key=lambda r: r["common"]["rms_relative_error"], default=None)
    return [{"group": dict(points.group), "metric": points.metric, **r, "chosen": r is best} for r in rows]


def _links(result: Study, losses: dict[str, Points], refits: Refits) -> list[dict[str, Any]]:
    out = []
    for p in result.sound:
        loss = losses.get(p.name)
        if loss is None or p.kind not in ("distance", "score") or is_part(p.metric):
            continue
        if p.is_data_ladder:
            # The smaller data sizes are measured more lightly.
            continue
        found = link(loss, p, refits.of(law("power-floor", loss.rung_axis)), result.choice.level)
        if found:
            out.append(found)
    return out


def _sensitivities(result: Study) -> list[dict[str, Any]]:
    """Of the losses' laws along the ladder, in C and in N and D."""
    named = ("power-floor", "compute", "chinchilla")
    chosen = [f for f in result.fits if f.points.kind == "loss" and f.law.name in named]
    return [row for f in chosen for row in sensitivity(f, result.table, result.choice.level)]


def _noise(result: Study) -> list[dict[str, Any]]:
    """Seed noise per metric and unit, pooled over groups; or the statement that there are no replicates."""
    out = []
    for metric, unit in dict.fromkeys((p.metric, p.unit) for p in result.points):
        mine = [p for p in result.points if (p.metric, p.unit) == (metric, unit)]
        found = [n for p in mine if (n := seed_noise(p)) is not None]
        whole, ends = pooled(found), unlike(found)
        row = {
            "metric": metric,
            "unit": unit,
            "standard_deviation": whole.relative if whole else None,
            "dof": whole.dof if whole else 0,
            "groups": [n.group for n in found],
            "unlike": [{"group": n.group, "standard_deviation": n.relative, "dof": n.dof} for n in ends or ()],
        }
        out.append(row)
    return out


def _doubling(points: Points, level: float) -> dict[str, Any] | None:
    """The mean change of log metric (of the score itself) per doubling of N over the ladder: no law is assumed."""
    top = points.largest_data()
    if points.kind == "signed" or len(np.unique(top.n)) < 3:
        return None
    ends = slope(np.log2(top.n), top.y if points.kind == "score" else np.log(top.y), level)
    change = [float(v) for v in (ends if points.kind == "score" else np.expm1(ends))]
    return {"group": dict(points.group), "metric": points.metric, "kind": points.kind, "change": change}


def _run_ids(result: Study) -> dict[int, str]:
    frame = result.table.frame
    return dict(zip(frame["_row"].tolist(), frame["run_id"].astype(str), strict=True)) if "run_id" in frame else {}


def _attach_rollouts(doc: dict[str, Any], fits: Sequence[Fit], rollouts: dict) -> None:
    for shown, f in zip(doc["fits"], fits, strict=True):
        key = (f.points.metric, f.points.name, f.law.name, *f.law.axes)
        shown["rollout"] = rollouts.get(key, [])


def assemble(result: Study, predictions: Path | None, planned: Sequence[dict] = ()) -> dict[str, Any]:
    """The document of a study. `predictions` is the record kept beside laws.json (None: none is kept)."""
    doc, choice = document(result), result.choice
    headline = [p for p in result.sound if not is_part(p.metric)]
    rollouts: dict[tuple[str, ...], list[dict]] = {}
    refits = Refits(choice)
    doc["law_choice"] = [row for p in headline for row in _law_choice(result, p, refits, rollouts)]
    _attach_rollouts(doc, result.fits, rollouts)
    losses = {p.name: p for p in result.sound if p.kind == "loss"}
    # A law with a blocking remark (no optimum, parameters that trade off) has no best split to offer.
    joint = [a for f in result.fits if f.headline and (a := allocation(f, choice.level))]
    of = {(a["metric"], "-".join(a["group"].values()) or "all"): a for a in joint}
    scores = [p for p in headline if p.kind == "score" and np.isfinite(p.c).all() and len(p)]
    compared = comparisons(result.sound, result.fits, choice.level)
    doc |= {
        "noise": _noise(result),
        "doublings": [row for p in headline if (row := _doubling(p, choice.level))],
        "allocation": joint,
        "isoflop": [row for p in headline for row in profiles(p, choice.level, of.get((p.metric, p.name)))],
        "composition": composition(result.sound, choice.level),
        "optima": optima(result.points, result.table.frame, choice.level),
        "links": _links(result, losses, refits),
        "ceilings": [row for p in scores for row in ceiling_band(p, lambda chosen, points: refits.of(chosen)(points))],
        **compared,
        "matched": matched(result.sound, result.fits, compared["contrasts"], choice.level),
        "sensitivity": _sensitivities(result),
        "verdicts": verdicts(result.points, result.fits, choice.level),
        "learning_curves": learning_curves(result.table),
        "recommended_runs": [],
        "runs": {"ids": _run_ids(result), "folder": ""},
    }
    if predictions is not None:
        entries = [e for p in headline for e in _registered(p, refits, planned)]
        doc["predictions"] = keep_record(predictions, entries, headline, result.table.sha256)
    return doc


def _registered(points: Points, refits: Refits, planned: Sequence[dict]) -> list[dict[str, Any]]:
    name, axis = "logit" if points.kind == "score" else "power-floor", points.rung_axis
    chosen = law(name, axis, signed_floor=points.kind == "signed")
    mine = [r for r in planned if all(str(r.get(k)) == v for k, v in points.group.items())]
    places = [{"n": float(r["params_total"]), "d": float(r["images"]), "c": float(r["train_flops"])} for r in mine]
    data = points.largest_data().d
    if axis == "n" and np.isfinite(data).all() and not data_levels(data).any():
        # A law in N is of one data size, and says nothing of a run of another.
        places = [place for place in places if not data_levels(np.append(data, place["d"])).any()]
    return register(_held(chosen, points), refits.of(chosen), refits.choice.level, places)
