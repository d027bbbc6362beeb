"""The learning curves of finished runs, made small for the table's folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from statistics import fmean

from fluidscale.folder import RunFolder
from slurm.parquet import write_rows

# Points a curve: more are not seen. Of fewer steps than three there is none.
_POINTS, _FEWEST = 80, 3

Curve = tuple[list[float], list[float]]


def curve(run_dir: Path) -> Curve | None:
    """Images seen and training loss (points,): means over bins of equal width in log images, for the eye."""
    steps = _read(RunFolder(run_dir).metrics)
    if len(steps) < _FEWEST:
        return None
    first, last = steps[0][0], steps[-1][0]
    if first == last:
        return None

    def place(step: tuple[float, float]) -> int:
        return min(int(_POINTS * math.log(step[0] / first) / math.log(last / first)), _POINTS - 1)

    bins = [list(of) for _, of in groupby(steps, place)]
    return [fmean(images for images, _ in of) for of in bins], [fmean(loss for _, loss in of) for of in bins]


def _read(metrics: Path) -> list[tuple[float, float]]:
    """Line by line; a torn or foreign one is no reason to lose the rest."""
    steps = []
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        try:
            entry = json.loads(line)
            images, loss = float(entry["images"]), float(entry["train_loss"])
        except (ValueError, TypeError, KeyError):
            continue
        if images > 0 and math.isfinite(images):
            steps.append((images, loss))
    return sorted(steps)


def write_per_step(path: Path, runs: Iterable[tuple[str, Curve | None]]) -> None:
    """Writes run_id, images, train_loss (lists of equal length): a row a run."""
    write_rows(path, ("run_id", "images", "train_loss"), [(run, *found) for run, found in runs if found is not None])
