"""Learning curves of the runs in a table, where they lie beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from analysis.laws import Array
from analysis.table import Table, read_beside

FILE = "per_step.parquet"
COLUMNS = ("run_id", "images", "train_loss")


def beside(table: Path) -> dict[str, tuple[Array, Array]]:
    """Run id -> images seen and training loss (points,), from the file beside a table. Raises InvalidTable."""
    return read_beside(table, FILE, COLUMNS, "UNREADABLE_CURVES", _by_run)


def _by_run(frame: Any) -> dict[str, tuple[Array, Array]]:
    parts = zip(frame["run_id"], frame["images"], frame["train_loss"], strict=True)
    found = {str(run): (np.asarray(images, float), np.asarray(losses, float)) for run, images, losses in parts}
    for run, (images, losses) in found.items():
        if images.ndim != 1 or images.shape != losses.shape:
            raise ValueError(f"{run}: {images.shape} images and {losses.shape} losses")
    return found


def learning_curves(table: Table) -> list[dict[str, Any]]:
    """Training loss against images seen, of the longest run of each trunk."""
    frame = table.frame
    if not {"run_id", "images"} <= set(frame.columns):
        return []
    key = "trunk_id" if "trunk_id" in frame else "run_id"
    longest = frame.sort_values("images").drop_duplicates(key, keep="last")
    out = []
    for _, row in longest[longest["run_id"].astype(str).isin(list(table.curves))].iterrows():
        images, losses = table.curves[str(row["run_id"])]
        name = {g: str(row[g]) for g in table.columns.group}
        what = {"group": name, "run_id": str(row["run_id"]), "size": str(row.get("size", ""))}
        out.append({**what, "images": images, "loss": losses})
    return out
