"""The losses of finished runs, image by image, made small for the table's folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fluidscale.record import read_json
from slurm.parquet import write_rows

METRICS = ("val_loss", "val_nll")
# The mean of what an evaluation kept (7 digits an image) against the recorded number: else it is of other weights.
_SAME = 1e-5


def per_image(run_dir: Path, record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Metric -> values (images,); what an older evaluation did not keep, or belongs to another number, is left out."""
    found = {}
    for metric in METRICS:
        score = read_json(run_dir / "eval" / f"{metric}.json") or {}
        values = (score.get("extra") or {}).get("per_image") or []
        if values and None not in values and record.get(metric) is not None:
            mean = math.fsum(values) / len(values)
            if abs(mean - record[metric]) <= _SAME * max(abs(mean), max(map(abs, values)) / len(values) ** 0.5):
                found[metric] = values
    return found


def write_per_image(path: Path, runs: Iterable[tuple[str, Mapping[str, list[float]]]]) -> None:
    """Writes run_id, metric, values (float32 an image): a row a run and metric."""
    import numpy as np

    rows = [(run, metric, np.array(v, np.float32)) for run, found in runs for metric, v in found.items()]
    write_rows(path, ("run_id", "metric", "values"), rows)
