"""The points of one metric in one group: what a law is fitted to, with their standard errors, clusters and floors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.laws import Array
from analysis.table import InvalidTable, Table, kind_of, numbers

# labels that must agree within one group before its values may be compared at all
AGREEING = (("_unit", "MIXED_UNITS", "units"), ("_protocol", "MIXED_PROTOCOLS", "protocols"))


@dataclass(frozen=True)
class Points:
    """Measured points (all arrays (n,)): axes n, d, c in the table's units, y with se (NaN where unknown), clusters.

    `floor` and `real_floor` are a distance's reconstruction and real-to-real floors, `ceiling` a score's best value
    reachable through the tokenizer; None where the table does not give them.
    """

    group: Mapping[str, str]
    metric: str
    kind: str
    unit: str
    protocol: str
    rows: np.ndarray
    n: Array
    d: Array
    c: Array
    y: Array
    se: Array
    count: Array
    cluster: np.ndarray
    seed: np.ndarray
    floor: float | None = None
    real_floor: float | None = None
    ceiling: float | None = None

    def __len__(self) -> int:
        return len(self.y)

    def axis(self, name: str) -> Array:
        return {"n": self.n, "d": self.d, "c": self.c}[name]

    def take(self, mask: np.ndarray) -> Points:
        """The points that a boolean mask or an index array selects."""
        names = ("rows", "n", "d", "c", "y", "se", "count", "cluster", "seed")
        return replace(self, **{name: getattr(self, name)[mask] for name in names})

    def largest_data(self) -> Points:
        """At each model size the rows of its largest data size: the ladder that one-axis laws are fitted to."""
        if not np.isfinite(self.d).all() or not np.isfinite(self.n).all():
            return self
        most = {size: self.d[self.n == size].max() for size in np.unique(self.n)}
        return self.take(np.array([np.isclose(d, most[size]) for size, d in zip(self.n, self.d, strict=True)], bool))

    @property
    def name(self) -> str:
        return "-".join(self.group.values()) or "all"


def _label(rows: pd.DataFrame, metric: str, suffix: str, code: str, what: str, group: Mapping[str, str]) -> str:
    column = metric + suffix
    if column not in rows:
        return ""
    found = sorted({str(v).strip() for v in rows[column].dropna()} - {""})
    if len(found) > 1:
        where = "-".join(group.values()) or "the table"
        raise InvalidTable(code, f"{metric} in {where} mixes {what} {', '.join(found)}: split them with --group {column}")
    return found[0] if found else ""


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
            return values <= 0, f"{metric} is not positive (its law has a logarithm; only a signed metric may be)"
    return np.zeros(len(values), bool), ""


def _codes(rows: pd.DataFrame, column: str | None) -> np.ndarray:
    if column is None or column not in rows:
        return np.arange(len(rows))
    text = rows[column].astype(object).where(rows[column].notna(), "").astype(str)
    blank = text.str.strip() == ""
    text = text.where(~blank, pd.Series([f"_row{i}" for i in rows["_row"]], index=rows.index))
    return pd.factorize(text)[0]


def _drop_duplicates(rows: pd.DataFrame, table: Table, metric: str, excluded: list[dict]) -> pd.DataFrame:
    """Equal rows count once; rows that claim to be the same run and disagree are refused."""
    columns = table.columns
    keys = [c for c in (columns.n, columns.d, columns.c, columns.seed) if c]
    identity = [*keys, *(c for c in ("run_id", columns.cluster) if c and c in rows)]
    twice = rows.duplicated(subset=list(dict.fromkeys([*identity, metric])), keep="first").to_numpy()
    for row in rows["_row"][twice]:
        reason = f"repeats an earlier row ({metric} and all keys equal)"
        excluded.append({"row": int(row), "run_id": "", "code": "DUPLICATE", "reason": reason})
    rows = rows[~twice]
    if columns.seed or "run_id" in rows:
        same = ["run_id"] if "run_id" in rows else keys
        named = rows[rows["run_id"].astype(str).str.strip() != ""] if "run_id" in rows else rows
        clash = named.duplicated(subset=same, keep=False)
        if clash.any():
            where = ", ".join(str(r) for r in named["_row"][clash].head(4))
            message = f"rows {where} are the same run by {'+'.join(same)} but differ in {metric}: keep one of them"
            raise InvalidTable("CONTRADICTING_DUPLICATES", message)
    return rows


def select(table: Table, group: Mapping[str, str], rows: pd.DataFrame, metric: str, kind: str | None = None) -> tuple[Points, list[dict]]:
    """One group's points for one metric and what was excluded for it. Raises InvalidTable."""
    if metric not in rows:
        have = ", ".join(map(str, list(rows.columns)[:12]))
        raise InvalidTable("MISSING_COLUMN", f"{table.source} has no column {metric} (it has {have}): name yours with --metric")
    kind = kind or kind_of(metric) or "loss"
    excluded: list[dict] = []
    values, blank, broken = numbers(rows[metric])
    outside, why = _bad_values(values, kind, metric)
    outside &= ~blank & ~broken
    for mask, code, reason in ((broken, "NOT_A_NUMBER", f"{metric} is not a finite number"), (outside, "OUT_OF_RANGE", why)):
        for row, run in zip(rows["_row"][mask], rows.get("run_id", rows["_row"])[mask], strict=True):
            excluded.append({"row": int(row), "run_id": str(run), "code": code, "reason": reason})
    rows = rows.assign(**{metric: values})[~blank & ~broken & ~outside]
    rows = _drop_duplicates(rows, table, metric, excluded)
    unit, protocol = (_label(rows, metric, *spec, group) for spec in AGREEING)
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
        unit=unit,
        protocol=protocol,
        rows=rows["_row"].to_numpy(int),
        n=column(columns.n),
        d=column(columns.d),
        c=column(columns.c),
        y=rows[metric].to_numpy(float),
        se=np.where(se > 0, se, np.nan),
        count=column(f"{metric}_n"),
        cluster=_codes(rows, columns.cluster),
        seed=_codes(rows, columns.seed) if columns.seed else np.zeros(len(rows), int),
        floor=_constant(rows, f"{metric}_floor") if kind == "distance" else None,
        real_floor=_constant(rows, f"{metric}_real_floor"),
        ceiling=_constant(rows, "geneval_ceiling") if kind == "score" and metric == "geneval" else None,
    )
    return points, excluded
