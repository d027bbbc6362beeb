"""Settings that vary among runs of one size and data size: such rows are no repetitions and cannot share a law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

# what a record says of how a run was trained and drawn; every other key that varies has a dotted column
NAMED = (
    "lr", "batch", "mask_law", "guidance_scale", "temperature", "num_inference_steps", "tokenizer_sha", "text_encoder",
)  # fmt: skip
# how much is measured, which units, protocols and counts already tell apart
NOT_SETTINGS, SAMPLING = "evaluate.", "evaluate.sampling."


def is_setting(column: str) -> bool:
    """Whether a column of a record's schema says how a run was made, other than its size, its data size and its seed.

    A dotted key of the spec does, unless it only says how much is measured.
    """
    return column in NAMED or ("." in column and (not column.startswith(NOT_SETTINGS) or column.startswith(SAMPLING)))


def _values(rows: Any, cell: Sequence[str]) -> Any:
    """Distinct (cell, settings) combinations; only rows of a record's schema have settings."""
    if "schema_version" not in rows or not cell:
        return pd.DataFrame()
    columns = [c for c in rows.columns if is_setting(str(c)) and c not in cell]
    text: Any = rows[columns].astype(object).where(rows[columns].notna(), "").astype(str)
    return pd.concat([rows[list(cell)], text], axis=1).drop_duplicates()


def varied(rows: pd.DataFrame, cell: Sequence[str]) -> list[str]:
    """Settings with several values among rows that agree in the columns `cell` (size and data size)."""
    distinct = _values(rows, cell)
    if distinct.empty or not distinct.duplicated(list(cell)).any():
        return []
    counts = distinct.groupby(list(cell), dropna=False).nunique().max()
    return [str(name) for name, most in counts.items() if most > 1]


def splitting(frame: pd.DataFrame, group: Sequence[str], cell: Sequence[str]) -> list[str]:
    """The varied settings that cut every group into ladders: no group has more values than one of its cells.

    A rate that follows the width has other values at each size: it leaves no ladder and is not among them. Nor is a
    tokenizer's hash where what people call the tokenizers by (channels, codes) tells them apart as well.
    """
    out = []
    for name in varied(frame, [*group, *cell]):
        text: Any = frame[name].astype(str)
        within = text.groupby([frame[c] for c in (*group, *cell)], dropna=False).nunique().max()
        over = text.groupby([frame[c] for c in group], dropna=False).nunique().max() if group else text.nunique()
        if over <= within:
            out.append(name)
    by_name = [name for name in out if name != "tokenizer_sha"]
    return by_name if by_name and _parts(frame, [*group, *by_name]) == _parts(frame, [*group, *out]) else out


def _parts(frame: pd.DataFrame, columns: Sequence[str]) -> int:
    return len(frame[list(columns)].astype(str).drop_duplicates())


def differ_in_one(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two groups tell what made their difference: arms that were also split by settings differ in one thing."""
    split = {"token_kind", "order"} < {*one}
    return not split or sum(one[key] != other[key] for key in one) == 1
