"""Intervals that cover: Gauss-Newton with Student t by default, profile F and cluster bootstraps as options."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.distributions import two_sided
from analysis.fit import Fit
from analysis.laws import SPLIT_LAWS, Array

LEVEL = 0.95


@dataclass(frozen=True)
class Prediction:
    """A law's mean at one place, its interval, a new run's interval, and how far outside the data it lies (decades)."""

    mean: float
    low: float
    high: float
    run_low: float
    run_high: float
    decades: float


def degrees(fit: Fit, gradient: Array) -> float:
    """Satterthwaite degrees of freedom of g' cov g: between-trunk variance counts trunks, the rest counts rows."""
    variance_within, dof_within = fit.within
    variance_between, dof_between = fit.between
    if variance_between == 0.0:
        return dof_within
    total = float(gradient @ fit.covariance @ gradient)
    free = ~fit.frozen
    bread = np.linalg.pinv((fit.jacobian * fit.weights) @ fit.jacobian.T, rcond=1e-14)
    within = float(gradient[free] @ bread @ gradient[free]) * variance_within
    between = max(total - within, 0.0)
    share = within**2 / dof_within + between**2 / dof_between
    return float(np.clip(total**2 / share, dof_between, dof_within + dof_between)) if share > 0 else dof_within


def spread(fit: Fit, gradient: Array, level: float = LEVEL) -> float:
    """The half-width t * sqrt(g' cov g) of a linear form of the parameters."""
    variance = max(float(gradient @ fit.covariance @ gradient), 0.0)
    return two_sided(level, degrees(fit, gradient)) * float(np.sqrt(variance))


def parameter_intervals(fit: Fit, level: float = LEVEL) -> dict[str, tuple[float, float]]:
    """Gauss-Newton t intervals of every reported parameter; on the log scale for amplitudes."""
    out = {}
    for parameter in fit.public():
        half = spread(fit, parameter.gradient, level)
        if parameter.logarithmic:
            low, high = parameter.value * np.exp(-half), parameter.value * np.exp(np.minimum(half, 700.0))
        else:
            low, high = parameter.value - half, parameter.value + half
        out[parameter.name] = (float(low), float(high))
    return out


def predict(fit: Fit, level: float = LEVEL, **axes: float) -> Prediction:
    """The mean law and a new run at one place (axis values in the table's units)."""
    mean, low, high, run_low, run_high = (float(v[0]) for v in band(fit, level, **axes))
    return Prediction(mean, low, high, run_low, run_high, extrapolation(fit, **axes))


def extrapolation(fit: Fit, **axes: float) -> float:
    """Decades by which the farthest axis leaves the fitted range; 0 inside it."""
    out = 0.0
    for name in fit.law.axes:
        values = np.log10(fit.points.axis(name))
        where = np.log10(axes[name])
        out = max(out, float(where - values.max()), float(values.min() - where))
    return max(out, 0.0)


def band(fit: Fit, level: float = LEVEL, **axes: Array | float) -> tuple[Array, Array, Array, Array, Array]:
    """Mean, low, high of the mean law and low, high of a new run along arrays of axis values (units of the table).

    Positive metrics are treated on the log scale, scores on the logit scale, signed ones as they are.
    """
    u = fit.coordinates(**axes)
    value, gradient = (v[0] for v in fit.law.evaluate(fit.theta[None], u))
    kind = fit.points.kind
    if kind == "score":
        ceiling = getattr(fit.law, "ceiling", 1.0)
        inside = value * (1 - value / ceiling)
        inside[inside == 0] = np.nan  # so near an end that a float cannot tell how near: nothing is known of the width
    else:
        inside = np.ones_like(value) if kind == "signed" else value
    slope = gradient / inside
    variance = np.einsum("pn,pq,qn->n", slope, fit.covariance, slope)
    worst = min((degrees(fit, slope[:, i]) for i in range(slope.shape[1])), default=fit.within[1])
    t = two_sided(level, worst)
    noise = _run_variance(fit, value) / (1.0 if fit.objective.logarithmic else inside**2)
    half, run_half = (np.nan_to_num(t * np.sqrt(v), nan=np.inf) for v in (variance, variance + noise))
    ends = [_shift(fit, value, h) for h in (-half, half, -run_half, run_half)]
    return (value * fit.scale, *(e * fit.scale for e in ends))  # type: ignore[return-value]


def _run_variance(fit: Fit, value: Array) -> Array:
    """Variance of one new run around the law, in the objective's residual units (a typical weight for scores)."""
    noise = fit.within[0] + fit.between[0]
    if fit.objective.name == "quasi-binomial":
        return noise * value * (1 - value) / np.median(fit.weights)
    return np.full_like(value, noise)


def _shift(fit: Fit, value: Array, by: Array) -> Array:
    if fit.points.kind == "signed":
        return value + by
    by = np.clip(by, -50, 50)  # an interval so wide ends nowhere
    if fit.points.kind == "score":
        ceiling = getattr(fit.law, "ceiling", 1.0)
        share = np.clip(value / ceiling, 1e-9, 1 - 1e-9)
        return ceiling / (1 + np.exp(-(np.log(share / (1 - share)) + by)))
    return value * np.exp(by)


def allocation_exponent(fit: Fit, level: float = LEVEL) -> tuple[float, float, float] | None:
    """beta / (alpha + beta), the exponent of N*(C), with its interval; None for a law of one axis."""
    if fit.law.name not in SPLIT_LAWS:
        return None
    alpha, beta = fit.parameter("alpha"), fit.parameter("beta")
    total = alpha.value + beta.value
    gradient = (alpha.value * beta.gradient - beta.value * alpha.gradient) / total**2
    value, half = beta.value / total, spread(fit, gradient, level)
    return value, value - half, value + half
