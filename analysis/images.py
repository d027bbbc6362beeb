"""Losses image by image, where they lie beside the table: errors of differences between runs on the same images.

All runs are evaluated on the same images with the same masks and noise, so most of an evaluation's error is common to
them: it moves a ladder as a whole and tells nothing of its slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.laws import Array
from analysis.table import read_beside

FILE = "per_image.parquet"
COLUMNS = ("run_id", "metric", "values")


def beside(table: Path) -> dict[tuple[str, str], Array]:
    """(run id, metric) -> values (images,) from the file beside a table; {} without one. Raises InvalidTable."""
    return read_beside(table, FILE, COLUMNS, "UNREADABLE_IMAGES", _by_run)


def _by_run(frame: Any) -> dict[tuple[str, str], Array]:
    parts = zip(frame["run_id"], frame["metric"], frame["values"], strict=True)
    return {(str(run), str(metric)): np.asarray(values, float) for run, metric, values in parts}


def aligned(runs: Sequence[Array | None], relative: bool) -> Array | None:
    """(runs, images), over each run's mean where `relative`; None unless all saw equally many images, two or more."""
    known = [r for r in runs if r is not None]
    if not known or len(known) < len(runs) or len({len(r) for r in known}) > 1 or len(known[0]) < 2:
        return None
    values = np.stack(known)
    return values / values.mean(1, keepdims=True) if relative else values


def paired_errors(values: Array) -> Array | None:
    """Standard error of each run's mean (runs,) beside the others': what is left once images are as hard for all.

    The residuals of values (runs, images) in the additive model run + image; None for a single run.
    """
    runs, images = values.shape
    if runs < 2:
        return None
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    return np.sqrt((rest**2).sum(1) / (images - 1) / images * runs / (runs - 1))


def paired_error(left: Array, right: Array) -> float:
    """Standard error of the difference of two means over the same images; each the mean of its runs (runs, images)."""
    difference = left.mean(0) - right.mean(0)
    return float(difference.std(ddof=1)) / np.sqrt(len(difference))
