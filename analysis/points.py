"""The points of one metric in one group: what a law is fitted to, with their standard errors, clusters and floors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.answers import Answers, of_metric
from analysis.images import aligned, paired_errors
from analysis.laws import Array
from analysis.table import InvalidTable, Table, kind_of, no_number, numbers

# Data sizes closer than this are one, as where batches of two kinds do not divide them alike.
SAME_DATA = 1e-3


def data_levels(d: Array) -> np.ndarray:
    """The number of each value's data size, ascending from 0; values within SAME_DATA of the next are of one size."""
    order = np.argsort(d, kind="stable")
    level = np.zeros(len(d), dtype=int)
    level[order[1:]] = np.cumsum(np.diff(d[order]) > SAME_DATA * d[order][1:])
    return level


@dataclass(frozen=True)
class Points:
    """Measured points (all arrays (n,)): axes n, d, c in the table's units, y with se (NaN where unknown), clusters.

    `floor` and `real_floor` are a distance's reconstruction and real-to-real floors, `ceiling` a score's best value
    reachable through the tokenizer; None where the table does not give them. `answers` are a score's results prompt by
    prompt and `images` a loss image by image, by row, where they lie beside the table. `sizes` are the names of models,
    by row, where the table has them. `mixed` names settings in which rows of one size and data size differ: such points
    are shown, and no law, comparison or prediction rests on them.
    """

    group: Mapping[str, str]
    metric: str
    kind: str
    units: np.ndarray
    protocols: np.ndarray
    rows: np.ndarray
    n: Array
    d: Array
    c: Array
    y: Array
    se: Array
    count: Array
    cluster: np.ndarray
    seed: np.ndarray
    answers: Mapping[int, Answers] = field(default_factory=dict)
    images: Mapping[int, Array] = field(default_factory=dict)
    sizes: Mapping[int, str] = field(default_factory=dict)
    floor: float | None = None
    real_floor: float | None = None
    ceiling: float | None = None
    mixed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.y)

    def axis(self, name: str) -> Array:
        return {"n": self.n, "d": self.d, "c": self.c}[name]

    @cached_property
    def error(self) -> Array:
        """Standard errors (n,) between these points: paired over images where all saw the same ones."""
        relative = self.kind == "loss"
        values = aligned([self.images.get(int(r)) for r in self.rows], relative)
        found = None if values is None else paired_errors(values)
        return self.se if found is None else found * (self.y if relative else 1.0)

    def take(self, mask: np.ndarray) -> Points:
        """The points that a boolean mask or an index array selects."""
        names = ("units", "protocols", "rows", "n", "d", "c", "y", "se", "count", "cluster", "seed")
        return replace(self, **{name: getattr(self, name)[mask] for name in names})

    def largest_data(self) -> Points:
        """The rows of the largest data size that all model sizes have: the ladder that one-axis laws are fitted to.

        Where there is none, as in a ladder whose data grow with its models, each size's own largest.
        """
        if not np.isfinite(self.d).all() or not np.isfinite(self.n).all():
            return self
        level, sizes = data_levels(self.d), [self.n == size for size in np.unique(self.n)]
        shared = set.intersection(*(set(level[here].tolist()) for here in sizes)) if sizes else set()
        most = np.full(len(self), max(shared, default=0))
        for here in sizes if not shared else ():
            most[here] = level[here].max()
        top = level == most
        return self if top.all() else self.take(top)

    def within_ladder(self) -> Points:
        """Without rows of more data than the ladder's: the smaller sizes alone might share them, as another ladder."""
        if not np.isfinite(self.d).all():
            return self
        return self.take(self.d <= self.largest_data().d.max() * (1 + SAME_DATA))

    @cached_property
    def is_data_ladder(self) -> bool:
        """Whether this is one model trained on several data sizes: its laws are then along D."""
        if not np.isfinite([self.n, self.d]).all():
            return False
        return len(np.unique(self.n)) == 1 < len(np.unique(data_levels(self.d)))

    def ladder(self) -> Points:
        """The rows that one-axis laws are judged on: the largest data size, or of a data ladder all measured alike."""
        return self.alike() if self.is_data_ladder else self.largest_data()

    @cached_property
    def rung_axis(self) -> str:
        """The axis that orders the ladder: N (D where there is one N), or C or D in a table that lacks it."""
        if self.is_data_ladder:
            return "d"
        return next((axis for axis in ("n", "c", "d") if np.isfinite(self.axis(axis)).all()), "n")

    @property
    def rung(self) -> Array:
        """Each point's place on the ladder."""
        return self.axis(self.rung_axis)

    @cached_property
    def name(self) -> str:
        return "-".join(self.group.values()) or "all"

    @cached_property
    def unit(self) -> str:
        """The unit at the largest data size; "" where the table gives none."""
        return _one(self.largest_data().units)

    @cached_property
    def protocol(self) -> str:
        """The protocol at the largest data size; smaller ones may be evaluated more lightly."""
        return _one(self.largest_data().protocols)

    def alike(self) -> Points:
        """The rows measured as those of the largest data size are: what a joint law over all data sizes may use.

        Unit, protocol and, for a distance, which is biased in it, the number of samples.
        """
        top = self.largest_data()
        same = np.isin(self.units, top.units) & np.isin(self.protocols, top.protocols)
        if self.kind == "distance":
            same &= np.isin(self.count, top.count) | ~np.isfinite(self.count)
        return self.take(same)

    def agree_in_settings(self) -> None:
        """Raises InvalidTable where rows of one size and data size were made under several values of a setting."""
        if self.mixed:
            names = ", ".join(self.mixed)
            raise InvalidTable(
                "MIXED_SETTINGS", f"{self.name}: runs of one size and data size differ in {names}: they cannot share "
                "a law; name a column of their values with --group, or fit a table of one of them"
            )  # fmt: skip

    def agree(self) -> None:
        """Raises InvalidTable where settings, units, protocols or sample counts of a biased metric are mixed."""
        self.agree_in_settings()
        labels = [("MIXED_UNITS", "units", self.units), ("MIXED_PROTOCOLS", "protocols", self.protocols)]
        if self.kind == "distance":
            labels.append(("MIXED_COUNTS", "sample counts", self.count[np.isfinite(self.count)]))
        for code, what, values in labels:
            found = [str(v) for v in np.unique(values) if str(v)]
            if len(found) > 1:
                raise InvalidTable(
                    code, f"{self.metric} in {self.name} mixes {what} {', '.join(found)}: they cannot share a law; "
                    "split them with --group or evaluate again under one"
                )  # fmt: skip


def _one(labels: np.ndarray) -> str:
    found = [str(v) for v in np.unique(labels) if str(v)]
    return " / ".join(found)


def _labels(rows: pd.DataFrame, column: str) -> np.ndarray:
    if column not in rows:
        return np.full(len(rows), "", dtype=object)
    text = rows[column].astype(object).where(rows[column].notna(), "").astype(str).str.strip()
    return text.to_numpy(dtype=object).astype(str)


def _protocols(rows: pd.DataFrame, metric: str, kind: str) -> np.ndarray:
    """A score is a mean, unbiased in the number of images: its error carries n, and n does not split its protocol."""
    exact = _labels(rows, f"{metric}_protocol")
    any_n = _labels(rows, f"{metric}_protocol_any_n")
    return np.where(any_n != "", any_n, exact) if kind == "score" else exact


def _answers(table: Table, rows: pd.DataFrame, metric: str) -> dict[int, Answers]:
    if not table.answers or "run_id" not in rows:
        return {}
    found = {
        int(row): of_metric(table.answers, str(run), metric)
        for row, run in zip(rows["_row"], rows["run_id"], strict=True)
    }
    return {row: one for row, one in found.items() if one is not None}


def _images(table: Table, rows: pd.DataFrame, metric: str) -> dict[int, Array]:
    if not table.images or "run_id" not in rows:
        return {}
    keys = ((int(row), (str(run), metric)) for row, run in zip(rows["_row"], rows["run_id"], strict=True))
    return {row: table.images[key] for row, key in keys if key in table.images}


def _constant(rows: pd.DataFrame, column: str) -> float | None:
    if column not in rows:
        return None
    values = numbers(rows[column])[0]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _bad_values(values: Array, kind: str, metric: str) -> tuple[np.ndarray, str]:
    with np.errstate(invalid="ignore"):
        if kind == "score":
            return (values < 0) | (values > 1), f"{metric} is outside [0, 1]"
        if kind in ("loss", "distance"):
            return values <= 0, f"{metric} is not positive, and its law has a logarithm (--objective lse has none)"
    return np.zeros(len(values), bool), ""


def _no_percents(values: Array, metric: str) -> None:
    """Raises InvalidTable for scores of which those of at most 1 % would pass for shares and the others be dropped."""
    percents = values[(values > 1) & (values <= 100)]
    if len(percents):
        message = f"{metric} is as high as {percents.max():.4g}, and scores are shares of 1: divide percents by 100"
        raise InvalidTable("PERCENT", message)


def _codes(rows: pd.DataFrame, column: str | None) -> np.ndarray:
    if column is None or column not in rows:
        return np.arange(len(rows))
    text = rows[column].astype(object).where(rows[column].notna(), "").astype(str)
    blank = text.str.strip() == ""
    text = text.where(~blank, pd.Series([f"_row{i}" for i in rows["_row"]], index=rows.index))
    return pd.factorize(text)[0]


def run_names(table: Table, rows: pd.DataFrame) -> pd.DataFrame | None:
    """The columns by which two rows are the same run, at the rows that have them; None where the table has none.

    Checkpoints of a run share its run_id and differ in an axis; where run_id names clusters, it names no runs.
    """
    columns = table.columns
    axes = [c for c in (columns.n, columns.d, columns.c) if c]
    name = "run_id" if "run_id" in rows and columns.cluster != "run_id" else columns.seed
    return rows.loc[_labels(rows, name) != "", list(dict.fromkeys([*axes, name]))] if name else None


def _drop_duplicates(rows: pd.DataFrame, table: Table, metric: str, excluded: list[dict]) -> pd.DataFrame:
    """Equal rows count once; rows that claim to be the same run and disagree are refused."""
    columns = table.columns
    keys = [c for c in (columns.n, columns.d, columns.c, columns.seed) if c]
    identity = [*keys, *(c for c in ("run_id", columns.cluster) if c and c in rows)]
    twice = rows.duplicated(subset=list(dict.fromkeys([*identity, metric])), keep="first").to_numpy()
    for row in rows["_row"].to_numpy()[twice]:
        reason = f"repeats an earlier row ({metric} and all keys equal)"
        excluded.append({"row": int(row), "run_id": "", "code": "DUPLICATE", "reason": reason})
    rows = rows.loc[~twice]
    names = run_names(table, rows)
    if names is not None and (clash := names.duplicated(keep=False)).any():
        where = ", ".join(str(r) for r in rows.loc[names.index[clash], "_row"].tolist()[:4])
        message = (
            f"rows {where} are the same run by {'+'.join(names)} but differ in {metric}: keep one of them, or name "
            "what tells them apart with --group"
        )
        raise InvalidTable("CONTRADICTING_DUPLICATES", message)
    return rows


def _read_columns(table: Table, rows: pd.DataFrame, metric: str) -> list[str]:
    """The columns behind one metric: copying the hundred others with every step would cost more than the fits."""
    own = table.columns
    about = ("", "_se", "_unit", "_n", "_protocol", "_protocol_any_n", "_floor", "_real_floor")
    keys = {"_row", "run_id", "size", own.n, own.d, own.c, own.cluster, own.seed, own.se, "geneval_ceiling"}
    return [c for c in rows.columns if c in keys or c in {metric + suffix for suffix in about}]


def select(
    table: Table, group: Mapping[str, str], rows: pd.DataFrame, metric: str, kind: str | None = None
) -> tuple[Points, list[dict]]:
    """One group's points for one metric and what was excluded for it. Raises InvalidTable."""
    if metric not in rows:
        have = ", ".join(map(str, list(rows.columns)[:12]))
        message = f"{table.source} has no column {metric} (it has {have}): name yours with --metric"
        raise InvalidTable("MISSING_COLUMN", message)
    kind = kind or kind_of(metric) or "loss"
    rows = rows.loc[:, _read_columns(table, rows, metric)]
    excluded: list[dict] = []
    values, blank, broken = numbers(rows[metric])
    if kind == "score":
        _no_percents(values, metric)
    outside, why = _bad_values(values, kind, metric)
    outside &= ~blank & ~broken
    not_number = no_number(metric, rows[metric], broken)
    for mask, code, reason in ((broken, "NOT_A_NUMBER", not_number), (outside, "OUT_OF_RANGE", why)):
        names = rows["run_id"] if "run_id" in rows else rows["_row"]
        for row, run in zip(rows["_row"].to_numpy()[mask], names.to_numpy()[mask], strict=True):
            excluded.append({"row": int(row), "run_id": str(run), "code": code, "reason": reason})
    rows = rows.assign(**{metric: values}).loc[~blank & ~broken & ~outside]
    rows = _drop_duplicates(rows, table, metric, excluded)
    columns = table.columns
    se_name = columns.se or f"{metric}_se"
    nothing = np.full(len(rows), np.nan)

    def column(name: str | None) -> Array:
        return numbers(rows[name])[0] if name is not None and name in rows else nothing.copy()

    se = column(se_name)
    points = Points(
        group=dict(group),
        metric=metric,
        kind=kind,
        units=_labels(rows, f"{metric}_unit"),
        protocols=_protocols(rows, metric, kind),
        rows=rows["_row"].to_numpy(int),
        n=column(columns.n),
        d=column(columns.d),
        c=column(columns.c),
        y=rows[metric].to_numpy(float),
        se=np.where(se > 0, se, np.nan),
        count=column(f"{metric}_n"),
        cluster=_codes(rows, columns.cluster),
        seed=_labels(rows, columns.seed or ""),
        answers=_answers(table, rows, metric) if kind == "score" else {},
        images=_images(table, rows, metric) if kind in ("loss", "signed") else {},
        sizes=dict(zip(rows["_row"].astype(int), _labels(rows, "size"), strict=True)),
        floor=_constant(rows, f"{metric}_floor") if kind == "distance" else None,
        real_floor=_constant(rows, f"{metric}_real_floor"),
        ceiling=_constant(rows, "geneval_ceiling") if kind == "score" and metric == "geneval" else None,
    )
    return points, excluded


def comparable(a: Points, b: Points) -> bool:
    """Whether two groups' values may be subtracted: same metric, unit and protocol.

    A likelihood is per image: it is also compared across the orders of one tokenizer, whose protocols name the order.
    """
    if a.metric != b.metric or a.unit != b.unit:
        return False
    kinds = (a.group.get("token_kind"), b.group.get("token_kind"))
    return a.protocol == b.protocol or (a.kind == "signed" and kinds[0] is not None and kinds[0] == kinds[1])
