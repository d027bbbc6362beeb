"""How to split a budget between size and data: N*(C) and D*(C) per arm and metric, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.crossings import DRAWS, draw
from analysis.fit import Fit
from analysis.intervals import allocation_exponent
from analysis.laws import SPLIT_LAWS, Array

DECADES_BEYOND = 1.0


def cost_law(fit: Fit) -> tuple[float, float]:
    """(k, p) of C = k N^p D over the fitted runs: FLOPs are not 6 N D for small models (embeddings, heads, text)."""
    n, d, c = (np.log(fit.points.axis(a)) for a in ("n", "d", "c"))
    power, log_k = np.polyfit(n, c - d, 1)
    return float(np.exp(log_k)), float(power)


def optimum(alpha: Array, beta: Array, a: Array, b: Array, k: float, p: float, budget: float) -> tuple[Array, Array]:
    """N*, D* that minimise A N^-alpha + B D^-beta subject to k N^p D = budget. All in the table's units."""
    log_g = (np.log(alpha * a) - np.log(p * beta * b)) / beta
    log_n = (np.log(budget / k) + log_g) / (p + alpha / beta)
    return np.exp(log_n), budget / (k * np.exp(p * log_n))


def allocation(fit: Fit, level: float) -> dict[str, Any] | None:
    """N*(C), D*(C) of one joint fit from the smallest measured budget to a decade beyond the largest.

    A score's law is best where its minus log odds are least, so all metrics share one formula.
    """
    if fit.law.name not in SPLIT_LAWS or not np.isfinite(fit.points.c).all():
        return None
    k, p = cost_law(fit)
    rng = np.random.default_rng(0)
    thetas = np.vstack([fit.theta, draw(fit, DRAWS, rng)])
    f = int(fit.law.parameters[0] == "E")
    log_a = np.log(fit.scale) + thetas[:, f] + thetas[:, f + 2] * fit.center[0]
    log_b = np.log(fit.scale) + thetas[:, f + 1] + thetas[:, f + 3] * fit.center[1]
    c = fit.points.c
    budgets = np.geomspace(c.min(), c.max() * 10**DECADES_BEYOND, 25)
    rows, tail = [], 50 * (1 - level)
    for budget in budgets:
        with np.errstate(all="ignore"):
            n, d = optimum(thetas[:, f + 2], thetas[:, f + 3], np.exp(log_a), np.exp(log_b), k, p, float(budget))
        finite = np.isfinite(n) & np.isfinite(d) & (n > 0) & (d > 0)
        value = float(fit.predict(n=n[:1], d=d[:1])[0]) if finite[0] else None
        rows.append({
            "c": float(budget), "n": float(n[0]), "d": float(d[0]), "value": value,
            "n_interval": [float(v) for v in np.percentile(n[finite], [tail, 100 - tail])],
            "d_interval": [float(v) for v in np.percentile(d[finite], [tail, 100 - tail])],
            "decades": max(0.0, float(np.log10(budget / c.max()))),
        })  # fmt: skip
    return {
        "group": dict(fit.points.group), "metric": fit.points.metric, "law": fit.law.name,
        "exponent": allocation_exponent(fit, level), "cost": {"k": k, "p": p}, "budgets": rows,
        "carried": fit.headline,
    }  # fmt: skip
