"""Quantiles and tails of Student's t, F and the normal distribution, and a line's slope with its interval.

From scipy.special: importing scipy.stats alone takes longer than fitting a small table.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from analysis.laws import Array


def t_quantile(p: float, dof: Array | float) -> Array:
    """Quantile of Student's t; dof may be an array or infinite (the normal distribution)."""
    return special.stdtrit(dof, p)


def two_sided(level: float, dof: Array | float) -> float:
    """Half-width, in standard errors, of a two-sided interval at `level` under Student's t with `dof`."""
    return float(t_quantile(0.5 + level / 2, dof))


def f_quantile(p: float, numerator: float, denominator: float) -> float:
    """Quantile of the F distribution."""
    return float(special.fdtri(numerator, denominator, p))


def f_tail(value: float, numerator: float, denominator: float) -> float:
    """P(F > value)."""
    return float(special.fdtrc(numerator, denominator, value))


def normal_quantile(p: float) -> float:
    return float(special.ndtri(p))


def normal_cdf(x: float) -> float:
    return float(special.ndtr(x))


def normal_pdf(x: float) -> float:
    return float(np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi))


def slope(x: Array, y: Array, level: float) -> tuple[float, float, float]:
    """The least-squares slope of y on x (three points or more) with the ends of its interval."""
    away = x - x.mean()
    spread = float(away @ away)
    found = float(away @ y) / spread
    rest = y - y.mean() - found * away
    error = float(np.sqrt(rest @ rest / (len(x) - 2) / spread))
    half = two_sided(level, len(x) - 2) * error
    return found, found - half, found + half
