"""Fluid's published results (arXiv 2410.13863, Table 1), shipped as data for fits of their own and as an overlay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.points import select
from analysis.table import load

TABLE = Path(__file__).parent / "data" / "fluid_published.csv"
METRICS = ("fid", "geneval")


def published() -> list[dict[str, Any]]:
    """The published values against parameters, one entry a metric; measured under the paper's own protocol."""
    table = load(TABLE, n="params_total")
    out = []
    for metric in METRICS:
        points, _ = select(table, {}, table.frame, metric)
        out.append({"metric": metric, "label": "Fluid, published", "n": points.n, "y": points.y})
    return out
