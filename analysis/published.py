"""What others have published: Fluid's results as data for fits and an overlay, and laws whose constants are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.points import select
from analysis.table import load

# arXiv 2410.13863, Table 1
TABLE = Path(__file__).parent / "data" / "fluid_published.csv"
METRICS = ("fid", "geneval")
# Hoffmann et al. 2022 (arXiv 2203.15556), Table 3: optimal FLOPs and tokens of nine model sizes by approach 1
CHINCHILLA_TABLE = Path(__file__).parent / "data" / "chinchilla_table3.csv"
# the same, equation 10 of appendix D.3: approach 3, rounded as printed
CHINCHILLA: Mapping[str, float] = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
# the same, Table 2: exponents of parameters and of tokens in compute, by approach
CHINCHILLA_EXPONENTS: Mapping[int, tuple[float, float]] = {1: (0.50, 0.50), 2: (0.49, 0.51), 3: (0.46, 0.54)}
# Besiroglu et al. 2024 (arXiv 2404.10102), Table 1: approach 3 fitted again to the points of the paper's figure
CHINCHILLA_REFIT: Mapping[str, float] = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
# Kaplan et al. 2020 (arXiv 2001.08361), Table 2: the joint fit of equation 1.5
KAPLAN: Mapping[str, float] = {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}
# the same, equations 1.1 and 1.2: scale and exponent of the laws in N alone and in D alone, fitted apart from Table 2
KAPLAN_ONE_AXIS: Mapping[str, tuple[float, float]] = {"n": (8.8e13, 0.076), "d": (5.4e13, 0.095)}


def published() -> list[dict[str, Any]]:
    """Fluid's values against parameters, one entry a metric; measured under the paper's own protocol."""
    table = load(TABLE, n="params_total")
    out = []
    for metric in METRICS:
        points, _ = select(table, {}, table.frame, metric)
        out.append({"metric": metric, "label": "Fluid, published", "n": points.n, "y": points.y})
    return out
