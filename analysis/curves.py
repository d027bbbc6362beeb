"""Learning curves of the runs behind a table, where their folders still lie beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

CURVE_POINTS = 80


def _read(path: Path) -> tuple[list[float], list[float]]:
    """Images seen and training loss, line by line; a torn or foreign line is no reason to lose the rest."""
    images, losses = [], []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("train_loss") is not None and entry.get("images"):
            images.append(float(entry["images"]))
            losses.append(float(entry["train_loss"]))
    return images, losses


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over CURVE_POINTS bins of equal width in log x: a curve for the eye, not for a fit."""
    edges = np.geomspace(x[0], x[-1] * (1 + 1e-9), CURVE_POINTS + 1)
    where = np.clip(np.digitize(x, edges) - 1, 0, CURVE_POINTS - 1)
    filled = np.unique(where)
    return np.array([x[where == k].mean() for k in filled]), np.array([y[where == k].mean() for k in filled])


def learning_curves(frame: pd.DataFrame, runs: Path, group: tuple[str, ...]) -> list[dict[str, Any]]:
    """Training loss against images seen, for the longest run of each trunk whose metrics.jsonl is there."""
    if not {"run_id", "images"} <= set(frame.columns) or not runs.is_dir():
        return []
    key = "trunk_id" if "trunk_id" in frame else "run_id"
    longest = frame.sort_values("images").drop_duplicates(key, keep="last")
    out = []
    for _, row in longest.iterrows():
        path = runs / str(row["run_id"]) / "metrics.jsonl"
        if not path.is_file():
            continue
        images, losses = _read(path)
        if len(images) < 3:
            continue
        x, y = _smooth(np.array(images), np.array(losses))
        name = {g: str(row[g]) for g in group}
        out.append(
            {"group": name, "run_id": str(row["run_id"]), "size": str(row.get("size", "")), "images": x, "loss": y}
        )
    return out
