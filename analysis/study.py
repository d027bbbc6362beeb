"""Which laws are fitted to which metric by default, and the fits of a whole table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.fit import Fit, Warned, default_objective, fit
from analysis.laws import Law, law
from analysis.noise import lack_of_fit, of_form, replicated, seed_variance
from analysis.points import Points, data_levels, select
from analysis.settings import varied
from analysis.solver import HUBER_DELTA, Objective
from analysis.table import AXES, InvalidTable, Table, is_part, kind_of, numbers
from analysis.variances import SeedVariance

# a point this many standard errors from its floor, or less, says that the floor is not one
FLOOR_TOUCH = 2.0
# remark on a law that has no E and was not asked for by name
FORCED_FLOOR = "FORCED_FLOOR"


@dataclass(frozen=True)
class Choice:
    """What the user asked for; empty or None means the defaults of each metric."""

    laws: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    objective: str | None = None
    delta: float = HUBER_DELTA
    floor: float | None = None
    level: float = 0.95
    interval: str = "gauss-newton-t"
    predict: tuple[Mapping[str, float], ...] = ()
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.5 <= self.level < 1:
            raise InvalidTable("BAD_LEVEL", f"--level {self.level} is not in [0.5, 1)")
        for name, value in (("penalty", self.penalty), ("delta", self.delta)):
            if not 0 < value < np.inf:
                raise InvalidTable(f"BAD_{name.upper()}", f"--{name} {value} is not positive and finite")
        if self.floor is not None and not np.isfinite(self.floor):
            raise InvalidTable("BAD_FLOOR", f"--floor {self.floor} is not finite: leave it out for a free floor")

    @property
    def explicit(self) -> bool:
        return bool(self.laws or self.metrics)


@dataclass(frozen=True)
class Study:
    """All fits of a table, the points of every metric and group, and what was refused, with its code."""

    table: Table
    choice: Choice
    points: tuple[Points, ...]
    fits: tuple[Fit, ...]
    refused: tuple[Mapping[str, object], ...]
    excluded: tuple[Mapping[str, object], ...]

    @property
    def sound(self) -> list[Points]:
        """The points that may be compared and predicted: those of groups whose settings agree."""
        return [p for p in self.points if not p.mixed]

    def find(self, metric: str, law_name: str, axes: tuple[str, ...] | None = None) -> list[Fit]:
        """Fits of one metric and law over all groups, in the table's order."""
        same = [f for f in self.fits if f.points.metric == metric and f.law.name == law_name]
        return [f for f in same if axes is None or tuple(f.law.axes) == axes]


def fixed_floor(points: Points) -> tuple[float | None, list[Warned]]:
    """The measured floor of a distance: the tokenizer's reconstruction, or real-to-real where samples touch that."""
    if points.kind != "distance":
        return None, []
    if points.floor is None:
        return None, [Warned("NO_FLOOR", f"{points.metric} has no measured floor: E is free and wide")]
    error = np.nan_to_num(points.se, nan=0.0)
    if (points.y - points.floor > FLOOR_TOUCH * error).all():
        return points.floor, []
    real = points.real_floor or 0.0
    message = f"samples come within 2 SE of the tokenizer's floor {points.floor:.4g}: real-to-real {real:.4g} is used"
    if not (points.y > real).all():
        return 0.0, [Warned("FLOOR_TOUCHED", message + " but is touched too: 0 is used", True)]
    return real, [Warned("FLOOR_TOUCHED", message)]


def default_laws(points: Points) -> list[Law]:
    """Over N and C on the largest data size, and the joint laws in (N, D); the tags of a score along one axis only.

    Over D alone where one model size was trained on several data sizes.
    """
    signed = points.kind == "signed"
    if points.is_data_ladder:
        return [law("logit", "d") if points.kind == "score" else law("power-floor", "d", signed_floor=signed)]
    if points.kind == "score":
        one_axis = [law("logit", "n"), law("logit", "c")]
        return one_axis if is_part(points.metric) else [*one_axis, law("logit-joint")]
    coupled = [law("kaplan"), law("kaplan-floor")] if points.kind == "loss" else []
    joint = [law("chinchilla", signed_floor=signed), *coupled]
    return [law("power-floor", signed_floor=signed), law("compute", signed_floor=signed), *joint]


def suited(chosen: Law, points: Points) -> Points:
    """One-axis laws take each size's largest data size; joint laws and ladders with D in step with N take all.

    Of a distance or a score, that is all that was measured as the largest data size was: others were measured lightly.
    """
    if len(chosen.axes) > 1 or chosen.axes == ("d",):
        return points.alike() if points.kind in ("distance", "score") else points
    return points.largest_data()


def _of_scores(law_name: str) -> bool:
    return law_name in ("logit", "logit-joint")


def _read_for(chosen: Law, points: Points, objective: str) -> Points:
    """To a law of scores a metric of others is one. Raises InvalidTable for what is none."""
    bounded = _of_scores(chosen.name)
    if bounded and kind_of(points.metric) is None:
        points = replace(points, kind="score")
    if points.kind != "score" and (bounded or objective == "quasi-binomial"):
        what = f"law {chosen.name}" if bounded else "the quasi-binomial"
        way_out = "take --law power-floor" if bounded else "take --law logit, or leave out --objective"
        raise InvalidTable("NOT_A_SCORE", f"{points.metric} in {points.name}: {what} is for scores alone: {way_out}")
    return points


def _axes_present(chosen: Law, table: Table) -> bool:
    return all(table.columns.axis(axis) for axis in chosen.axes)


def fit_one(
    chosen: Law, points: Points, choice: Choice, thorough: bool = True, seeds: SeedVariance | None = None
) -> Fit:
    """One law on one metric's points, with the metric's own floor and objective. Raises InvalidTable.

    `seeds`: what replicates show of the noise between runs; None asks these points alone, as a held-out test must.
    """
    points = _read_for(chosen, points, choice.objective or default_objective(points).name)
    used = suited(chosen, points)
    used.agree()
    if seeds is None:
        seeds = seed_variance([points.alike()])
    floor, warned = fixed_floor(used)
    if choice.floor is not None:
        floor, warned = choice.floor, []
    floored = "E" in chosen.parameters
    _carries_signs(chosen, used, choice.floor)
    if choice.floor is not None and not floored:
        raise InvalidTable("NO_FLOOR_IN_LAW", f"law {chosen.name} has no E to fix: drop --floor or take power-floor")
    name = choice.objective or default_objective(used).name
    objective = Objective(name, choice.delta, choice.penalty)
    try:
        done = fit(chosen, used, objective, floor if floored else None, thorough, seeds)
    except InvalidTable as error:
        raise _of_kept(error, chosen, points, used) from None
    remarks = [*(warned if floored else []), *_left_lighter(chosen, points, used)]
    return replace(done, warnings=(*done.warnings, *remarks, *_confounded(chosen, used)))


def _of_kept(error: InvalidTable, chosen: Law, points: Points, used: Points) -> InvalidTable:
    """A refusal for want of rows says which of them a law takes, where it was others that it lacked."""
    if not error.code.startswith("TOO_FEW") or len(used) == len(points):
        return error
    kept = "measured as the largest data size is" if len(chosen.axes) > 1 else "at each size's largest data size"
    return InvalidTable(error.code, f"{error.args[0]} among the rows {kept}, which alone this law takes")


def _carries_signs(chosen: Law, used: Points, floor: float | None) -> None:
    """Raises InvalidTable for values <= 0 under a law that has none, and for a floor <= 0 where no value can be."""
    where = f"{used.metric} in {used.name}"
    if used.kind == "signed" and used.y.min() <= 0 and not getattr(chosen, "signed_floor", False):
        message = f"{where} has values <= 0 and law {chosen.name} gives none: take power-floor, compute or chinchilla"
        raise InvalidTable("NON_POSITIVE", message)
    if floor is not None and floor < 0 and used.kind != "signed":
        message = f"--floor {floor} is negative and {where} is positive throughout: fix one of 0 or more"
        raise InvalidTable("BAD_FLOOR", message)


def _confounded(chosen: Law, used: Points) -> list[Warned]:
    """Where data grow with the models, a law along either holds what the other does: neither exponent is its own.

    Where they are the same throughout, the law in C is the law in N by another name, and no frontier.
    """
    if chosen.axes == ("c",) and np.isfinite([used.n, used.d]).all():
        fixed = len(np.unique(used.n)) > 1 and not data_levels(used.d).any()
        return [Warned("FIXED_DATA", "C varies through N alone; for the frontier see N*(C)")] if fixed else []
    other = {"n": "d", "d": "n"}.get(chosen.axes[0]) if len(chosen.axes) == 1 else None
    if other is None or not np.isfinite(used.axis(other)).all() or not data_levels(used.axis(other)).any():
        return []
    axis, other = chosen.axes[0].upper(), other.upper()
    message = f"{other} is not the same throughout: a law in {axis} alone holds its effect too: fit --law compute"
    return [Warned("CONFOUNDED_LADDER", message, True)]


def _left_lighter(chosen: Law, points: Points, used: Points) -> list[Warned]:
    left = len(points) - len(used) if len(chosen.axes) > 1 else 0
    message = f"{left} rows at smaller data sizes were measured with other counts or protocols: not in this law"
    return [Warned("LIGHTER_ROWS", message)] if left else []


def _requested(points: Points, choice: Choice) -> list[Law]:
    if not choice.laws:
        return default_laws(points)
    signed, known = points.kind == "signed", kind_of(points.metric) is not None
    names = [name for name in choice.laws if known or _of_scores(name) == (points.kind == "score")]
    return [law(name, _axis(name, points), signed_floor=signed) for name in names]


def _axis(name: str, points: Points) -> str:
    """The axis of a one-axis law: N where it is known (scores: C), else the first one that is."""
    order = ("c", "n", "d") if name == "logit" else ("n", "c", "d")
    return next((axis for axis in order if np.isfinite(points.axis(axis)).all()), order[0])


def _kinds(metric: str, choice: Choice) -> list[str | None]:
    """As what a metric is read: one of others as a score by the laws of scores and by no other; None: by its name."""
    if kind_of(metric) is not None or not choice.laws:
        return [None]
    asked = {_of_scores(name) for name in choice.laws}
    return [kind for kind, bounded in ((None, False), ("score", True)) if bounded in asked]


def _signed(rows: pd.DataFrame, metric: str, choice: Choice) -> str | None:
    """A metric of others, asked for on its raw scale and not positive throughout, may have any sign."""
    if choice.objective != "lse" or kind_of(metric) is not None or metric not in rows:
        return None
    values = numbers(rows[metric])[0]
    return "signed" if (values[np.isfinite(values)] <= 0).any() else None


def _refusal(
    group: Mapping[str, str], metric: str, error: InvalidTable, chosen: Law | None = None
) -> dict[str, object]:
    """What laws.json says of a law that was not fitted; without one, of all laws of a metric in a group."""
    law_of = {"law": chosen.name, "axes": list(chosen.axes)} if chosen else {"law": None}
    return {"group": dict(group), "metric": metric, **law_of, "code": error.code, "message": error.args[0]}


def _selected(table: Table, choice: Choice) -> tuple[list[Points], list[dict], list[dict]]:
    """The points of every metric and group, what was refused, what was excluded.

    Raises InvalidTable where a metric that was asked for by name is refused in every group.
    """
    metrics: Sequence[str] = choice.metrics or table.metrics()
    if not metrics:
        raise InvalidTable("NO_METRIC", f"{table.source} has no metric of the known schema: name one with --metric")
    found, refused, excluded = [], [], list(table.excluded)
    groups = [(group, rows, tuple(varied(rows, table.cell))) for group, rows in table.groups()]
    for metric, kind in ((m, kind) for m in metrics for kind in _kinds(m, choice)):
        errors: list[InvalidTable] = []
        for group, rows, mixed in groups:
            try:
                points, dropped = select(table, group, rows, metric, kind or _signed(rows, metric, choice))
            except InvalidTable as error:
                errors.append(error)
                if choice.metrics and len(errors) == len(groups):
                    raise errors[0] from None
                refused.append(_refusal(group, metric, error))
                continue
            dropped += _blank(rows, metric) if metric in choice.metrics else []
            excluded += [{**e, "metric": metric} for e in dropped]
            if not len(points):
                continue
            found.append(replace(points, mixed=mixed))
            try:
                found[-1].agree_in_settings()
            except InvalidTable as error:
                refused.append(_refusal(group, metric, error))
    return found, _once(refused), _once(excluded)


def _blank(rows: pd.DataFrame, metric: str) -> list[dict]:
    """The rows without a metric that was asked for by name."""
    here = rows.loc[numbers(rows[metric])[1]]
    names = here["run_id"].fillna("").astype(str) if "run_id" in here else [""] * len(here)
    reason = {"code": "MISSING", "reason": f"{metric} is blank"}
    return [{"row": int(row), "run_id": run, **reason} for row, run in zip(here["_row"], names, strict=True)]


def _once(items: Sequence[dict]) -> list[dict]:
    """Without what a metric read in two ways says twice."""
    return list({repr(item): item for item in items}.values())


def _gone(excluded: Sequence[Mapping[str, object]]) -> str:
    """What was left out before a refusal, since that may be its cause."""
    reasons = dict.fromkeys(str(e["reason"]) for e in excluded)
    return f" ({len(excluded)} rows were left out: {'; '.join(list(reasons)[:2])})" if excluded else ""


def study(table: Table, choice: Choice) -> Study:
    """Fits everything asked for; a fit the data cannot carry is listed as refused.

    Raises InvalidTable when what was asked for by name cannot be done for any group.
    """
    found, refused, excluded = _selected(table, choice)
    seeds, fits = replicated(found), []
    for points in found:
        for chosen in [] if points.mixed else _requested(points, choice):
            if not choice.laws and not _axes_present(chosen, table):
                continue
            try:
                fits.append(fit_one(chosen, points, choice, seeds=seeds[points.metric, points.kind, points.name]))
            except InvalidTable as error:
                refused.append(_refusal(points.group, points.metric, error, chosen))
    if not fits and choice.explicit and refused:
        raise InvalidTable(str(refused[0]["code"]), f"{refused[0]['message']}{_gone(excluded)}")
    _answerable(table, choice, found, fits, refused)
    if not found:
        first = refused[0] if refused else excluded[0] if excluded else None
        detail = first.get("message", first.get("reason")) if first else "every metric cell is blank"
        code = str(first["code"]) if first else "NOTHING_MEASURED"
        raise InvalidTable(code, f"{table.source}: no usable value: {detail}")
    shown: dict[tuple[str, str], Points] = {}
    for points in found:
        shown.setdefault((points.metric, points.name), points)
    points = tuple(shown.values())
    return Study(table, choice, points, tuple(_checked(fits, points, choice)), tuple(refused), tuple(excluded))


def _answerable(
    table: Table, choice: Choice, found: Sequence[Points], fits: Sequence[Fit], refused: Sequence[Mapping[str, object]]
) -> None:
    """Raises InvalidTable where no default law suits the table's axes, and for a place that no law can be asked at."""
    if found and not fits and not refused:
        known = ", ".join(axis.upper() for axis in AXES if table.columns.axis(axis))
        message = f"no law is fitted by default to a table of {known} alone: name one with --law, or map --n or --c"
        raise InvalidTable("NO_LAW", message)
    axes = dict.fromkeys(f.law.axes for f in fits)
    for place in choice.predict if fits else ():
        if not any(set(one) <= set(place) for one in axes):
            asked, needed = (",".join(f"{k}=.." for k in keys) for keys in (place, next(iter(axes))))
            message = f"--predict {asked}: no law here has these axes alone: give {needed}"
            raise InvalidTable("BAD_PLACE", message)


def _forced_floor(fit: Fit, choice: Choice) -> list[Warned]:
    """The exponents of a law without a floor take up the floor that the metric may have: no headline unasked."""
    if choice.laws or fit.points.kind == "score" or "E" in fit.law.parameters:
        return []
    message = f"law {fit.law.name} has no floor: its exponents are those of E = 0 (--law {fit.law.name} asks for them)"
    return [Warned(FORCED_FLOOR, message, True)]


def _checked(fits: Sequence[Fit], points: Sequence[Points], choice: Choice) -> list[Fit]:
    """Fits with a remark where the form was not asked for, or where replicates show that it misses the data."""
    seeds = of_form(points)
    remarks = ((*lack_of_fit(f, seeds[f.points.metric, f.points.name]), *_forced_floor(f, choice)) for f in fits)
    return [replace(f, warnings=(*f.warnings, *more)) for f, more in zip(fits, remarks, strict=True)]
