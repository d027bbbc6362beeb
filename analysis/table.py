"""Reads any table of finished runs and says, row by row, what was left out and why.

Nothing is ever filled in: a blank is "not measured", a literal `nan` or text in a number is excluded by name, and what
makes rows incomparable (units, protocols, contradicting duplicates) is refused with a code.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from analysis.settings import splitting

if TYPE_CHECKING:
    from analysis.answers import Answers

Parsed = TypeVar("Parsed")

AXES = ("n", "d", "c")
OWN_COLUMNS = {"n": "params_total", "d": "images", "c": "train_flops"}
OWN_GROUP = ("token_kind", "order")
FINISHED = ("done", "finished", "ok", "complete", "completed", "success", "succeeded", "")
# what each metric of our own schema is, hence how it is fitted and read
LOSSES = ("val_loss",)
SIGNED = ("val_nll",)
DISTANCES = ("fd", "fid")
SCORE_PREFIX = "geneval"
_COMMA = re.compile(r"[+-]?\d[\d.]*(,\d+)+([eE][+-]?\d+)?")
# the name of a group whose cell is empty
BLANK, EMPTY_CELLS = "(blank)", ("", "nan", "None", "<NA>")
KINDS = ("loss", "signed", "distance", "score")


class InvalidTable(ValueError):
    """A table that cannot be analysed; `code` is stable, the message says what, where and the way out."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        return f"[{self.code}] {self.args[0]}"


@dataclass(frozen=True)
class Columns:
    """Which column is what. `cluster` names rows that share a trunk and are therefore not independent."""

    n: str | None
    d: str | None
    c: str | None
    group: tuple[str, ...]
    cluster: str | None = None
    seed: str | None = None
    se: str | None = None

    def axis(self, name: str) -> str | None:
        return {"n": self.n, "d": self.d, "c": self.c}[name]


@dataclass(frozen=True)
class Table:
    """Usable rows (axes as floats), what was excluded, and the sha256 of the bytes it was read from.

    `left_out` are the rows dropped for their status alone. `answers` holds results prompt by prompt and
    `images` losses image by image, by (run id, metric), and `curves` images seen and training loss, by run id, where
    they lie beside the table.
    """

    frame: pd.DataFrame
    columns: Columns
    source: str
    sha256: str
    n_rows: int
    excluded: tuple[dict, ...] = ()
    left_out: pd.DataFrame = field(default_factory=pd.DataFrame)
    answers: Mapping[tuple[str, str], Answers] = field(default_factory=dict)
    images: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def cell(self) -> list[str]:
        """The columns that say which size and data size a row is of."""
        return _cell(self.frame, self.columns.n, self.columns.d)

    def groups(self) -> list[tuple[dict[str, str], pd.DataFrame]]:
        """Every group with its rows, in the table's order of first appearance."""
        if not self.columns.group:
            return [({}, self.frame)]
        parts = self.frame.groupby(list(self.columns.group), sort=False, dropna=False)
        out = []
        for key, rows in parts:
            parts_of = key if isinstance(key, tuple) else (key,)
            out.append((dict(zip(self.columns.group, parts_of, strict=True)), rows))
        return out

    def metrics(self) -> list[str]:
        """The metrics of our own schema that at least one row carries: losses first, a score's tags last."""
        known = [str(c) for c in self.frame.columns if kind_of(str(c)) is not None and f"{c}_se" in self.frame.columns]
        found = [c for c in known if np.isfinite(numbers(self.frame[c])[0]).any()]
        return sorted(found, key=lambda c: (is_part(c), KINDS.index(str(kind_of(c)))))


def kind_of(metric: str) -> str | None:
    """`loss`, `signed`, `distance` or `score` for the metrics of our own schema, None for any other name."""
    for kind, names in (("loss", LOSSES), ("signed", SIGNED), ("distance", DISTANCES)):
        if metric in names:
            return kind
    # `_n` also ends `_protocol_any_n`
    suffixes = ("_se", "_unit", "_n", "_protocol", "_ceiling", "_floor")
    return "score" if metric.startswith(SCORE_PREFIX) and not metric.endswith(suffixes) else None


def is_part(metric: str) -> bool:
    """Whether a metric is a part of the score: one of its tags, or what it is on held-out combinations."""
    return metric.startswith(f"{SCORE_PREFIX}_")


def read(path: Path | str) -> tuple[pd.DataFrame, str]:
    """A CSV, parquet or JSON-lines file, or a folder of runs (each with a record.json) -> frame and sha256.

    CSV cells stay text here, so that a blank, a `nan` and a word are told apart later. Raises InvalidTable.
    """
    path = Path(path)
    if path.is_dir():
        return _read_runs(path)
    if not path.exists():
        raise InvalidTable("NO_TABLE", f"{path} does not exist: give a table, or make one with `make collect`")
    blob = path.read_bytes()
    if not blob.strip():
        raise InvalidTable("EMPTY_TABLE", f"{path} is empty: collect again")
    sha = hashlib.sha256(blob).hexdigest()
    try:
        if path.suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(io.BytesIO(blob))
        elif path.suffix in (".jsonl", ".ndjson", ".json"):
            frame = _from_json(blob.decode("utf-8-sig"))
        else:
            frame = _from_csv(blob.decode("utf-8-sig"))
    except (ValueError, OSError, csv.Error, pd.errors.ParserError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidTable(
            "UNREADABLE_TABLE", f"{path} is no readable {path.suffix or 'CSV'} table: {reason}"
        ) from error
    if frame.empty:
        raise InvalidTable("NO_ROWS", f"{path} has a header but no rows: nothing has finished yet")
    return frame, sha


def read_beside(
    table: Path, file: str, columns: Sequence[str], code: str, parse: Callable[[Any], dict[Any, Parsed]]
) -> dict[Any, Parsed]:
    """What collecting left beside a table, as `parse` reads its frame; {} without it. Raises InvalidTable(code)."""
    path = table.parent / file
    if not path.is_file():
        return {}
    try:
        return parse(pd.read_parquet(path, columns=list(columns)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidTable(code, f"{path}: {reason}: collect again or move it away") from error


def _from_json(text: str) -> pd.DataFrame:
    """One JSON object a line, or one list of them. Raises ValueError."""
    whole = text.lstrip().startswith("[")
    rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row is no JSON object of column: value")
    return pd.DataFrame(rows)


def _from_csv(text: str) -> pd.DataFrame:
    """Comma, semicolon or tab, whichever the header has; lines that begin with # before it are notes.

    Lines end with \\n, \\r\\n or \\r. Raises ValueError.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").splitlines(keepends=True)
    notes = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    header = lines[notes] if notes < len(lines) else ""
    mark = next((mark for mark in ",;\t" if mark in header), ",")
    table = io.StringIO("".join(lines[notes:]))
    read = filter(None, csv.reader(table, delimiter=mark, skipinitialspace=True))
    names, rows = [name.strip() for name in next(read, [])], list(read)
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise ValueError(f"several columns are called {', '.join(twice)}: give each a name of its own")
    start, end = _labels(names, rows), len(names)
    cells = [[*row[start:], *[""] * end][:end] for row in rows]
    return pd.DataFrame(cells, columns=[name or f"unnamed {i}" for i, name in enumerate(names)], dtype=str)


def _labels(names: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """How many cells of each row come before those that the header names: 1 where each begins with a label, as R's do.

    A blank cell more at the end is a mark too many. Raises ValueError for what is neither.
    """
    longer = [row for row in rows if len(row) > len(names)]
    more = {len(row) - len(names) for row in longer}
    ends = {bool(row[-1].strip()) for row in longer}
    if more <= {1} and ends <= {False}:
        return 0
    if more == {1} and ends == {True} and len({row[0] for row in longer}) == len(rows):
        return 1
    wide = len(names) + max(more)
    raise ValueError(f"{len(names)} columns are named, rows have up to {wide} cells: name each, quote text with commas")


def _read_runs(folder: Path) -> tuple[pd.DataFrame, str]:
    records = sorted(folder.glob("*/record.json"))
    if not records:
        raise InvalidTable("NO_ROWS", f"{folder} holds no */record.json: no run there has finished")
    digest, rows = hashlib.sha256(), []
    for record in records:
        blob = record.read_bytes()
        digest.update(blob)
        try:
            rows.append(json.loads(blob))
        except ValueError as error:
            raise InvalidTable(
                "UNREADABLE_TABLE", f"{record} is not JSON: evaluate that run again ({error})"
            ) from error
    return pd.DataFrame(rows), digest.hexdigest()


def numbers(column: pd.Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (float, NaN where none), a mask of blanks, a mask of cells that are there but are no finite number."""
    there = column.notna().to_numpy()
    cells = [cell if known else "" for cell, known in zip(column.tolist(), there, strict=True)]
    blank = np.array([isinstance(cell, str) and not cell.strip() for cell in cells], bool)
    values = np.array([_number(cell) for cell in cells], float)
    return values, blank, ~blank & ~np.isfinite(values)


def no_number(name: str, column: pd.Series, broken: np.ndarray) -> str:
    """Why cells of a column are none: in tables from elsewhere, mostly their commas."""
    commas = [cell for cell in column[broken].astype(str) if _COMMA.fullmatch(cell.strip())]
    hint = f": {commas[0]} has a comma; decimals want a point, thousands nothing" if commas else ""
    return f"{name} is not a finite number{hint}"


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def load(path: Path | str, **mapping: Any) -> Table:
    """Reads and prepares a table; `mapping` as in `prepare`. Raises InvalidTable."""
    frame, sha = read(path)
    return prepare(frame, sha, str(path), **mapping)


def prepare(
    frame: pd.DataFrame,
    sha: str,
    source: str,
    *,
    n: str | None = None,
    d: str | None = None,
    c: str | None = None,
    group: Sequence[str] | None = None,
    cluster: str | None = None,
    seed: str | None = None,
    se: str | None = None,
) -> Table:
    """A frame from anywhere (read-only and nullable columns included; it is not modified) -> Table.

    n, d, c, group, cluster, seed and se name columns; without n, d and c those of our own schema are expected, as is
    each of them and the group that is not named in a table that says it is of that schema. Without `group`, settings
    that vary within a size and cut the rows into whole ladders are part of the group.
    """
    if frame.empty:
        raise InvalidTable("NO_ROWS", f"{source} has no rows")
    own = not (n or d or c) or "schema_version" in frame
    axes = {axis: name for axis, name in (("n", n), ("d", d), ("c", c)) if name}
    if own:
        # a table may lack compute
        axes = {a: axes.get(a, name) for a, name in OWN_COLUMNS.items() if a in axes or a != "c" or name in frame}
    given = group is not None
    group = tuple(group) if group is not None else tuple(g for g in OWN_GROUP if own and g in frame)
    cluster = cluster or ("trunk_id" if "trunk_id" in frame else None)
    seed = seed or ("seed" if "seed" in frame else None)
    wanted = [*axes.values(), *group, *filter(None, (cluster if cluster != "trunk_id" else None, se))]
    missing = [name for name in wanted if name not in frame]
    if missing:
        have = ", ".join(map(str, list(frame.columns)[:12]))
        raise InvalidTable(
            "MISSING_COLUMN",
            f"{source} has no column {', '.join(missing)} (it has {have}): map yours with --n, --d, --c, --group",
        )
    out = frame.copy().reset_index(drop=True)
    out["_row"] = np.arange(len(out))
    excluded: list[dict] = []
    out = measurable = _drop_bad_axes(out, axes, excluded)
    out = _drop_unfinished(out, excluded)
    left_out = measurable.loc[~measurable["_row"].isin(out["_row"])]
    if not given:
        group += tuple(splitting(out, group, _cell(out, axes.get("n"), axes.get("d"))))
    out, left_out = (_named_groups(rows, group) for rows in (out, left_out))
    columns = Columns(axes.get("n"), axes.get("d"), axes.get("c"), group, cluster, seed, se)
    if out.empty:
        reasons = "; ".join(sorted({e["reason"] for e in excluded})[:3])
        message = f"{source}: all {len(frame)} rows are excluded ({reasons}){_no_number(frame, axes)}"
        raise InvalidTable("NO_USABLE_ROWS", message)
    return Table(out, columns, source, sha, len(frame), tuple(excluded), left_out)


def _no_number(frame: pd.DataFrame, axes: Mapping[str, str]) -> str:
    """The first cell of an axis that is no number and what to write, for the end of a refusal; "" where all are."""
    for name in axes.values():
        broken = numbers(frame[name])[2]
        if broken.any():
            return f": {name} has {str(frame[name].iloc[broken.argmax()])!r}: write plain numbers, such as 1e8"
    return ""


def _named_groups(frame: pd.DataFrame, group: Sequence[str]) -> pd.DataFrame:
    """Group cells as text: all that are blank, or as good as, are one group."""
    return frame.assign(**{
        name: [BLANK if str(cell).strip() in EMPTY_CELLS else str(cell) for cell in frame[name]] for name in group
    })  # fmt: skip


def _cell(frame: pd.DataFrame, n: str | None, d: str | None) -> list[str]:
    """Sizes go by name: a setting may change a model's parameters a little."""
    return [c for c in ("size" if "size" in frame else n, d) if c is not None]


def _exclude(frame: pd.DataFrame, mask: np.ndarray, code: str, reason: str, excluded: list[dict]) -> pd.DataFrame:
    for _, row in frame.loc[mask].iterrows():
        excluded.append({"row": int(row["_row"]), "run_id": str(row.get("run_id", "")), "code": code, "reason": reason})
    return frame.loc[~mask]


def _drop_bad_axes(frame: pd.DataFrame, axes: Mapping[str, str], excluded: list[dict]) -> pd.DataFrame:
    for name in axes.values():
        before = frame[name]
        values, blank, broken = numbers(before)
        frame = frame.assign(**{name: values})
        with np.errstate(invalid="ignore"):
            bad = [
                (blank, "MISSING", f"{name} is blank"),
                (broken, "NOT_A_NUMBER", no_number(name, before, broken)),
                (~blank & ~broken & ~(values > 0), "NON_POSITIVE", f"{name} is not positive"),
            ]
        gone = np.zeros(len(frame), bool)
        for mask, code, reason in bad:
            _exclude(frame, mask & ~gone, code, reason, excluded)
            gone |= mask
        frame = frame.loc[~gone]
    return frame


def _drop_unfinished(frame: pd.DataFrame, excluded: list[dict]) -> pd.DataFrame:
    if "status" in frame:
        status = frame["status"].fillna("").astype(str).str.strip().str.lower()
        for state in sorted(set(status) - set(FINISHED)):
            mask = (status == state).to_numpy()
            frame = _exclude(frame, mask, "NOT_FINISHED", f"status is {state}", excluded)
            status = status[~mask]
    if "lr_decay_complete" in frame:
        text = frame["lr_decay_complete"].astype(str).str.strip().str.lower()
        mask = text.isin(("false", "0", "0.0", "no")).to_numpy()
        frame = _exclude(frame, mask, "UNFINISHED_DECAY", "its learning rate had not decayed to the end", excluded)
    return frame
