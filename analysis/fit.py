"""Fits one law to one group's points: guards first, then multi-start, variable projection, covariance and AICc.

The covariance is Gauss-Newton's with the UNWEIGHTED Jacobian at the optimum, also under Huber: reweighted and plain
sandwich versions cover far below their level at six sizes. Where rows share a trunk, a between-trunk variance is
estimated from the residuals (analysis/variances.py) and enters both the covariance and, by Satterthwaite, the degrees
of freedom. Seeds of the group itself are rows like others; what replicates of the whole table show is the least that
either variance may be.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.distributions import normal_cdf, normal_pdf
from analysis.laws import EXPONENT_BOUNDS, Array, Law, Public, SumLaw
from analysis.points import Points
from analysis.solver import SCREEN_TOLERANCE, Objective, minimise, project
from analysis.table import InvalidTable
from analysis.variances import NO_SEEDS, SeedVariance, Spread, too_few_trunks, trunks_of, variances

EXPONENTS = ("alpha", "beta", "alpha_N", "alpha_D", "delta")
# fewer distinct values of an axis than this cannot tell a floor from a slope
LEVELS = 3
FEW = 6
# a start has reached the best when its objective is within this relative distance of it
REACHED = 1e-3
# above this many points the multi-start searches a subset; the whole table is only polished
SCREEN = 400
# Bounded scores: design effect of 4 images a prompt at within-prompt correlation .40 (1 + 3 * .40)
DESIGN_EFFECT = 2.2


@dataclass(frozen=True)
class Warned:
    """A coded remark on a fit. `blocks` keeps its exponents out of the headline."""

    code: str
    message: str
    blocks: bool = False


@dataclass(frozen=True)
class Fit:
    """A fitted law. theta and its covariance are internal (dimensionless); `public` gives the table's units.

    `variance` holds the within-run and between-trunk variance of the residuals with their degrees of freedom.
    """

    law: Law
    points: Points
    objective: Objective
    theta: Array
    value: float
    center: Array
    scale: float
    frozen: np.ndarray
    weights: Array
    residual: Array
    jacobian: Array
    covariance: Array
    within: Spread
    between: Spread
    starts: int
    share_at_best: float
    projection_gap: float | None
    aicc: float | None
    warnings: tuple[Warned, ...]
    seeds: SeedVariance = NO_SEEDS

    @property
    def free(self) -> int:
        return int((~self.frozen).sum())

    def coordinates(self, **axes: Array | float) -> Array:
        """Axis values in the table's units -> the law's coordinates (axes, n)."""
        columns = [np.atleast_1d(np.asarray(axes[name], float)) for name in self.law.axes]
        return np.log(np.stack(np.broadcast_arrays(*columns))) - self.center[:, None]

    def predict(self, **axes: Array | float) -> Array:
        """The mean law at axis values in the table's units."""
        return self.law.evaluate(self.theta[None], self.coordinates(**axes))[0][0] * self.scale

    def public(self) -> list[Public]:
        return self.law.public(self.theta, self.center, self.scale)

    def parameter(self, name: str) -> Public:
        return next(p for p in self.public() if p.name == name)

    @cached_property
    def by_seed(self) -> dict[str, Fit]:
        """The same law on the runs of each seed alone, for the seeds that can carry it."""
        floor = self.parameter("E").value if self.frozen.any() else None
        found = {}
        for seed in (s for s in np.unique(self.points.seed) if s):
            with suppress(InvalidTable):
                mine = self.points.take(self.points.seed == seed)
                found[str(seed)] = fit(self.law, mine, self.objective, floor, thorough=False)
        return found

    @property
    def headline(self) -> bool:
        return not any(w.blocks for w in self.warnings)


def weights_of(points: Points, objective: Objective, seeds: SeedVariance = NO_SEEDS) -> Array:
    """Weights (n,), mean 1, from seed variance plus standard errors (paired over images) floored at their median.

    The floor, because no single lucky error may own the fit.
    """
    if objective.name == "quasi-binomial":
        with np.errstate(divide="ignore", invalid="ignore"):
            size = points.y * (1 - points.y) / points.se**2
        size = np.where(np.isfinite(size) & (size > 0), size, points.count / DESIGN_EFFECT)
        known = size[np.isfinite(size)]
        return np.where(np.isfinite(size), size, np.median(known)) if len(known) else np.ones(len(points))
    error = points.error / np.abs(points.y) if objective.logarithmic else points.error
    if not np.isfinite(error).all():
        return np.ones(len(points))
    seed_variance = seeds.total * (1.0 if objective.logarithmic else scale_of(points) ** 2)
    weights = 1.0 / (np.maximum(error, np.median(error)) ** 2 + seed_variance)
    return weights / weights.mean()


def _unweighted(points: Points, objective: Objective) -> list[Warned]:
    """Says that standard errors were not used because some rows have none: a blank cell may be a slip."""
    missing = int((~np.isfinite(points.error)).sum())
    if objective.name == "quasi-binomial" or not 0 < missing < len(points):
        return []
    return [Warned("SE_INCOMPLETE", f"{missing} of {len(points)} rows have no standard error: all count alike")]


def guard(law: Law, points: Points, free: int) -> list[Warned]:
    """Refuses (InvalidTable) what cannot be fitted at all; returns warnings on what the data carry badly."""
    where = f"{points.metric} in {points.name}"
    for axis in law.axes:
        values = points.axis(axis)
        if not np.isfinite(values).all():
            message = f"{where}: law {law.name} needs a column for {axis.upper()}: map it with --{axis}"
            raise InvalidTable("MISSING_AXIS", message)
        levels = len(np.unique(np.round(np.log(values), 6)))
        if levels < LEVELS:
            code, what = ("TOO_FEW_SIZES", "sizes") if axis == "n" else ("TOO_FEW_LEVELS", "levels")
            message = f"{where}: {levels} distinct {axis.upper()}, law {law.name} needs {LEVELS} or more: add {what}"
            raise InvalidTable(code, message)
    if len(points) <= free:
        message = f"{where}: {len(points)} runs for {free} parameters of law {law.name}: add runs or take a smaller law"
        raise InvalidTable("TOO_FEW_RUNS", message)
    warned = []
    sizes = len(np.unique(points.axis(law.axes[0])))
    if sizes < FEW:
        warned.append(Warned("FEW_SIZES", f"{sizes} sizes only: the form of the law is taken on trust"))
    if len(law.axes) == 2:
        x, z = np.log(points.axis(law.axes[0])), np.log(points.axis(law.axes[1]))
        if abs(np.corrcoef(x, z)[0, 1]) > 0.95:
            message = f"{where}: D moves with N (correlation {np.corrcoef(x, z)[0, 1]:.3f}): fit --law compute instead"
            raise InvalidTable("COLLINEAR_LADDER", message)
        ratios = {s: len(np.unique(np.round(z[x == s], 6))) for s in np.unique(x)}
        if min(ratios.values()) < 2:
            warned.append(
                Warned("ONE_RATIO", "some sizes have a single data size: alpha and beta lean on the others", True)
            )
    return warned


# a threshold of this many standard deviations leaves nothing outside
ALL_INSIDE = 20.0


def huber_inflation(delta: float, sigma: float) -> float:
    """Asymptotic variance of Huber's estimator over that of least squares under Gaussian noise (pi/2 for small delta).

    Source: Huber 1964, E[psi^2] / E[psi']^2. Without it the Gauss-Newton interval narrows from .95 to .88 coverage as
    runs are added, because the residual sum of squares knows nothing of the estimator's lower efficiency.
    """
    c = delta / max(sigma, delta / ALL_INSIDE)
    inside, tail = 2 * normal_cdf(c) - 1, normal_cdf(-c)
    if inside < 1e-9:
        return np.pi / 2
    return float((inside - 2 * c * normal_pdf(c) + 2 * c * c * tail) / inside**2)


def _robust_correction(objective: Objective, mean_square: float, n: int, free: int) -> float:
    """Factor on the variance: kappa / (1 + p (kappa - 1) / (n - p)); the second term is already in the residuals."""
    if not objective.robust:
        return 1.0
    kappa = huber_inflation(objective.delta, float(np.sqrt(mean_square)))
    return kappa / (1.0 + free * (kappa - 1.0) / (n - free))


def _own(law: Law, objective: Objective, within: float, between: float) -> float:
    """The variance that counts as each row's own: under Huber's small threshold more than `within`.

    There residuals count by their signs, and those of one trunk agree less than its residuals do: their correlation is
    (2 / pi) asin(rho) (Sheppard 1899). With `within` alone intervals along few trunks of many data sizes are too narrow
    (tests/test_analysis_intervals.py has 5 of 7). Joint laws, of which a trunk holds a few rows, cover without
    (benchmarks/coverage.md).
    """
    total = within + between
    if not objective.robust or total == 0.0 or len(law.axes) > 1:
        return within
    return max(within, total * float(1 - 2 / np.pi * np.arcsin(between / total)))


def _covariance(jac: Array, weights: Array, codes: np.ndarray, within: float, between: float) -> Array:
    """Gauss-Newton covariance of the free parameters (p, p) under within-run and between-trunk variances."""
    bread = np.linalg.pinv((jac * weights) @ jac.T, rcond=1e-14)
    covariance = bread * within
    if between > 0:
        trunk = np.zeros((codes.max() + 1, len(jac)))
        np.add.at(trunk, codes, (jac * weights).T)
        covariance = covariance + between * bread @ (trunk.T @ trunk) @ bread
    return covariance


def _aicc(points: Points, fitted: Array, free: int) -> float | None:
    """AICc on log residuals (raw ones for signed metrics), so that laws with the same scale can be compared."""
    n, k = len(points), free + 1
    if n - k - 1 <= 0:
        return None
    rest = points.y - fitted if points.kind in ("signed", "score") else np.log(points.y / fitted)
    rss = max(float((rest**2).sum()), 1e-300)
    return float(n * np.log(rss / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def scale_of(points: Points) -> float:
    """The metric's geometric mean (mean size where it may be negative); scores are left as they are."""
    if points.kind == "score":
        return 1.0
    if points.kind == "signed":
        return float(max(np.abs(points.y).mean(), 1e-12))
    return float(np.exp(np.log(points.y).mean()))


@dataclass(frozen=True)
class _Optimum:
    """Parameters, objective, share of starts that reached it, variable projection's relative distance from it."""

    theta: Array
    value: float
    share: float
    gap: float | None
    converged: bool


def _search(
    law: Law,
    u: Array,
    y: Array,
    weights: Array,
    objective: Objective,
    frozen: np.ndarray,
    starts: Array,
    thorough: bool,
) -> _Optimum:
    """The optimum over all starts and, when `thorough`, over an independent variable projection.

    Above SCREEN points the searches run on every k-th point along the first axis, and only their best is finished on
    all of them: where the valley lies does not need every point, its bottom does.
    """
    n = u.shape[1]
    chosen = np.argsort(u[0], kind="stable")[:: -(-n // SCREEN)] if n > SCREEN else np.arange(n)
    u_few, y_few, w_few = u[:, chosen], y[chosen], weights[chosen]
    solved = minimise(
        law, u_few, y_few, starts, objective, w_few, frozen, 100 if thorough else 30, tolerance=SCREEN_TOLERANCE
    )
    best = int(np.argmin(solved.value))
    theta, value, gap = solved.theta[best], float(solved.value[best]), None
    if thorough and isinstance(law, SumLaw) and not law.signed_floor:
        projected = project(law, u_few, y_few, objective, w_few, frozen, starts[0])
        gap = float(projected.value[0] / value - 1) if value > 1e-18 else 0.0
        if projected.value[0] < value:
            theta, value = projected.theta[0], float(projected.value[0])
    share = float((solved.value <= value * (1 + REACHED) + 1e-18).mean())
    finished = minimise(law, u, y, theta[None], objective, weights, frozen)
    theta, value = finished.theta[0], float(finished.value[0])
    return _Optimum(theta, value, share, gap, bool(finished.converged[0]))


def _suits(points: Points, objective: Objective, floor: float | None) -> None:
    """Raises InvalidTable for values that the objective or a fixed floor has no place for, and where nothing varies."""
    where, least = f"{points.metric} in {points.name}", float(points.y.min())
    if objective.logarithmic and least <= 0:
        raise InvalidTable("NON_POSITIVE", f"{where} has values <= 0: fit it with --objective lse")
    if objective.name == "quasi-binomial" and not (least >= 0 and points.y.max() <= 1):
        raise InvalidTable("OUT_OF_RANGE", f"{where} is no score in [0, 1]: quasi-binomial is for those alone")
    if floor is not None and floor >= least:
        message = f"{where}: the floor {floor:.4g} is not below the least value {least:.4g}: fix a lower one or none"
        raise InvalidTable("FLOOR_ABOVE_DATA", message)
    if len(points) > 1 and np.ptp(points.y) <= 1e-12 * abs(least):
        raise InvalidTable("CONSTANT_METRIC", f"{where} is {least:.6g} in every run: there is no law to be fitted")


def fit(
    law: Law,
    points: Points,
    objective: Objective | None = None,
    floor: float | None = None,
    thorough: bool = True,
    seeds: SeedVariance = NO_SEEDS,
) -> Fit:
    """Fits `law` to `points`; `floor` fixes E in the metric's units. Raises InvalidTable where it cannot be done.

    `thorough=False` skips the variable projection (rollouts and benchmarks that refit many times); `seeds` is what
    replicates show of the noise between runs.
    """
    objective = objective or default_objective(points)
    _suits(points, objective, floor)
    frozen = np.zeros(len(law.parameters), bool)
    if floor is not None:
        frozen[law.parameters.index("E")] = True
    free = int((~frozen).sum())
    warned = guard(law, points, free) + _unweighted(points, objective)
    scale = scale_of(points)
    logs = np.log(np.stack([points.axis(a) for a in law.axes]))
    center = logs.mean(1)
    u, y, weights = logs - center[:, None], points.y / scale, weights_of(points, objective, seeds)
    starts = law.starts(u, y)
    if floor is not None:
        starts[:, 0] = floor / scale
    best = _search(law, u, y, weights, objective, frozen, starts, thorough)
    theta = best.theta
    fitted, gradient = law.evaluate(theta[None], u)
    residual, jac = objective.residuals(fitted, gradient, y)
    jacobian = jac[0][~frozen]
    within, between = variances(law, points, residual[0], weights, frozen, seeds)
    small = _covariance(jacobian, weights, trunks_of(points), _own(law, objective, within[0], between[0]), between[0])
    small *= _robust_correction(objective, within[0], len(points), free)
    covariance = np.zeros((len(theta), len(theta)))
    covariance[np.ix_(~frozen, ~frozen)] = small
    if too_few_trunks(law, points, frozen, seeds):
        trunks = len(np.unique(points.cluster))
        message = f"runs of {trunks} trunk(s): the intervals do not hold what another seed would give"
        warned.append(Warned("FEW_TRUNKS", message, True))
    warned += _remarks(law, best, frozen, jacobian, weights)
    aicc = _aicc(points, fitted[0] * scale, free)
    return Fit(
        law, points, objective, theta, best.value, center, scale, frozen, weights, residual[0], jacobian, covariance,
        within, between, len(starts), best.share, best.gap, aicc, tuple(warned), seeds,
    )  # fmt: skip


def _remarks(law: Law, best: _Optimum, frozen: np.ndarray, jac: Array, weights: Array) -> list[Warned]:
    low, high = law.bounds()
    warned = []
    for name, value, a, b, held in zip(law.parameters, best.theta, low, high, frozen, strict=True):
        if not held and (value <= a + 1e-12 or value >= b - 1e-12):
            message = f"{name} ended at its bound {value:.4g} (exponents in {EXPONENT_BOUNDS}, floors >= 0)"
            warned.append(Warned("AT_BOUND", message, True))
    if not best.converged:
        warned.append(Warned("NOT_CONVERGED", "the search ended before the objective was flat: no optimum yet", True))
    if best.share < 0.2:
        warned.append(Warned("FEW_STARTS", f"only {best.share:.0%} of the starts reached the best objective"))
    if best.gap is not None and abs(best.gap) > 1e-4:
        message = f"variable projection differs from the multi-start by {best.gap:.2e}"
        warned.append(Warned("STARTS_DISAGREE", message, True))
    columns = jac * np.sqrt(weights)
    columns = columns / np.maximum(np.linalg.norm(columns, axis=1, keepdims=True), 1e-300)
    condition = np.linalg.cond(columns)
    if not np.isfinite(condition) or condition > 1e6:
        warned.append(Warned("UNIDENTIFIED", f"parameters trade off exactly (condition {condition:.1e})", True))
    return warned


def default_objective(points: Points) -> Objective:
    """quasi-binomial for scores, raw least squares for signed metrics, Huber on logs otherwise."""
    return Objective({"score": "quasi-binomial", "signed": "lse"}.get(points.kind, "huber-log"))
