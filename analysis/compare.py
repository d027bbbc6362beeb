"""Arms against each other: paired differences, where one overtakes another, and which is best at a given compute.

Only metrics of one unit and protocol are compared. Runs of one size, data size and seed saw the same data in the same
order and are scored on the same prompts, so differences are taken pair by pair before anything is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from analysis.answers import paired
from analysis.distributions import t_quantile, two_sided
from analysis.fit import Fit
from analysis.images import aligned, paired_error
from analysis.laws import Array
from analysis.noise import FEW_REPLICATES, SeedNoise, pooled_by
from analysis.points import Points

DRAWS = 2000
# the usual power of a planned comparison (Cohen 1988, Statistical Power Analysis, 2.4)
POWER = 0.8
# a crossing is looked for this far (in decades) on either side of the measured range
REACH = 2.0
# points along that range: between two of them the difference of two smooth laws is a straight line to within 1e-3
GRID = 96


@dataclass(frozen=True)
class Contrast:
    """Metric of arm a minus that of arm b; for losses and distances the difference of logs (about a relative one).

    `paired_by` says what both had in common: "seeds", "prompts", "images". `error` is the standard error and
    `error_unpaired` the one without the pairing over prompts or images, None where there is none. `detectable` is the
    least effect that would have been told from zero four times out of five.
    """

    metric: str
    a: str
    b: str
    at: str
    effect: float
    low: float
    high: float
    pairs: int
    rows: tuple[int, ...]
    paired_by: tuple[str, ...]
    error: float
    error_unpaired: float | None
    detectable: float

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval excludes zero, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def comparable(a: Points, b: Points) -> bool:
    """Whether two groups' values may be subtracted: same metric, unit and protocol.

    A likelihood is per image: it is also compared across the orders of one tokenizer, whose protocols name the order.
    """
    if a.metric != b.metric or a.unit != b.unit:
        return False
    kinds = (a.group.get("token_kind"), b.group.get("token_kind"))
    return a.protocol == b.protocol or (a.kind == "signed" and kinds[0] is not None and kinds[0] == kinds[1])


def _transformed(points: Points) -> Array:
    return points.y if points.kind in ("score", "signed") else np.log(points.y)


def _scatter(points: Points, fit: Fit | None) -> tuple[Array, float]:
    """Variance of each point around its law in the contrasts' scale, with its dof; 0 where there is no law."""
    if fit is None or points.kind == "score":
        return np.zeros(len(points)), float("inf")
    variance = np.full(len(points), fit.within[0] + fit.between[0])
    if not fit.objective.logarithmic:
        variance = variance * fit.scale**2 / (1.0 if points.kind == "signed" else points.y**2)
    return variance, fit.within[1]


def _run_variance(points: Points, fit: Fit | None) -> tuple[Array, float]:
    """Variance of each point around its law: evaluation error or the residuals' spread, whichever is larger; dof."""
    error = np.nan_to_num(points.se if points.kind in ("score", "signed") else points.se / points.y) ** 2
    scatter, dof = _scatter(points, fit)
    return np.maximum(error, scatter), dof


def _over_images(a: Points, b: Points, pair: _Pair) -> float | None:
    """Evaluation error of a difference over the images that both sides saw; None where they are not known."""
    sides = [[p.images.get(int(r)) for r in p.rows[at]] for p, at in ((a, pair.a), (b, pair.b))]
    both = aligned([*sides[0], *sides[1]], relative=a.kind == "loss")
    return None if both is None else paired_error(both[: len(sides[0])], both[len(sides[0]) :])


def _by_rank(points: Points) -> list[np.ndarray]:
    """Indices of the points of each size, smallest first; arms may differ slightly in parameters at equal size."""
    return [np.flatnonzero(points.n == n) for n in np.unique(points.n)]


def _at_common_data(a: Points, b: Points) -> tuple[Points, Points] | None:
    """Each size at the largest data size that both have there; None where their sizes or data have no counterpart."""
    ranks = list(zip(_by_rank(a), _by_rank(b), strict=False))
    if not ranks or len(np.unique(a.n)) != len(np.unique(b.n)):
        return None
    kept = []
    for i, j in ranks:
        common = np.intersect1d(np.nan_to_num(a.d[i]), np.nan_to_num(b.d[j]))
        if not len(common):
            return None
        kept.append([k[np.nan_to_num(p.d[k]) == common.max()] for p, k in ((a, i), (b, j))])
    sides = [np.sort(np.concatenate(side)) for side in zip(*kept, strict=True)]
    return a.take(sides[0]), b.take(sides[1])


def detectable(error: float, dof: float, level: float) -> float:
    """The least true effect that an interval at `level` excludes zero for with probability POWER."""
    return error * (two_sided(level, dof) + float(t_quantile(POWER, dof)))


@dataclass(frozen=True)
class _Pair:
    """Two arms at one size: their points (indices), of common seeds where there are any, and the difference by seed."""

    a: np.ndarray
    b: np.ndarray
    by_seed: Array

    @property
    def seeded(self) -> bool:
        return len(self.by_seed) > 0


def _pair(a: Points, b: Points, i: np.ndarray, j: np.ndarray) -> _Pair:
    """Runs of one seed saw the same data in the same order: where both arms have some, only those are compared."""
    common = [s for s in np.unique(a.seed[i]) if s and s in b.seed[j]]
    if not common:
        return _Pair(i, j, np.array([]))
    ya, yb = _transformed(a), _transformed(b)
    sides = [np.array([y[k[p.seed[k] == s]].mean() for s in common]) for y, p, k in ((ya, a, i), (yb, b, j))]
    return _Pair(i[np.isin(a.seed[i], common)], j[np.isin(b.seed[j], common)], sides[0] - sides[1])


def _between_seeds(pairs: Sequence[_Pair]) -> tuple[float, float] | None:
    """Variance of the paired difference from seed to seed and its dof, pooled over sizes; None under FEW_REPLICATES."""
    rest = [p.by_seed - p.by_seed.mean() for p in pairs if len(p.by_seed) > 1]
    dof = sum(len(r) - 1 for r in rest)
    return (float(sum((r**2).sum() for r in rest)) / dof, float(dof)) if dof >= FEW_REPLICATES else None


def _evaluation(points: Points, at: np.ndarray) -> float:
    """Evaluation variance of the mean of some points."""
    error = points.se[at] if points.kind in ("score", "signed") else points.se[at] / points.y[at]
    return float(np.nan_to_num(error**2).mean()) / len(at)


def _run_to_run(
    a: Points, b: Points, pair: _Pair, between: tuple[float, float] | None, fits: Sequence[Fit | None]
) -> tuple[float, float]:
    """Variance of a difference at one size that other seeds would show, and its dof: from pairs, else from the laws."""
    if between is not None and pair.seeded:
        return between[0] / len(pair.by_seed), between[1]
    variance = dof = 0.0
    for points, at, fit in zip((a, b), (pair.a, pair.b), fits, strict=True):
        if points.kind == "score":
            variance += _evaluation(points, at) * (fit.seeds.total if fit is not None else 0.0)
            dof += fit.seeds.dof if fit is not None else 0.0
        else:
            spread, freedom = _run_variance(points, fit)
            variance += float(spread[at].mean()) / len(at)
            dof += freedom
    return variance, dof or float("inf")


def _one_size(
    a: Points, b: Points, pair: _Pair, between: tuple[float, float] | None, fits: Sequence[Fit | None]
) -> tuple[float, float, float, float | None, tuple[str, ...]]:
    """(effect, standard error, dof, error without that pairing, what of the evaluation was paired) at one size."""
    ya, yb = _transformed(a), _transformed(b)
    effect = float(pair.by_seed.mean()) if pair.seeded else float(ya[pair.a].mean() - yb[pair.b].mean())
    variance, dof = _run_to_run(a, b, pair, between, fits)
    if a.kind != "score":
        # evaluations share their draws, and replicates of a pair hold what is left of their error
        over_images = None if between is not None and pair.seeded else _over_images(a, b, pair)
        if over_images is None:
            return effect, float(np.sqrt(variance)), dof, None, ()
        sides = zip((a, b), fits, (pair.a, pair.b), strict=True)
        scatter = sum(float(_scatter(p, f)[0][at].mean()) / len(at) for p, f, at in sides)
        error = float(np.sqrt(max(over_images**2, scatter)))
        return effect, error, dof, float(np.sqrt(variance)), ("images",)
    apart = _evaluation(a, pair.a) + _evaluation(b, pair.b)
    known = [[p.answers[int(r)] for r in p.rows[at] if int(r) in p.answers] for p, at in ((a, pair.a), (b, pair.b))]
    complete = len(known[0]) == len(pair.a) and len(known[1]) == len(pair.b)
    found = paired(known[0], known[1]) if complete else None
    if found is None or not np.isfinite(found.error):
        return effect, float(np.sqrt(apart + variance)), _freedom(apart, variance, dof), None, ()
    # the images' own seeds are in the prompts' error and in the seeds' variance: once is enough
    variance = max(variance - (found.drawing or 0.0), 0.0)
    errors = [float(np.sqrt(e**2 + variance)) for e in (found.error, found.unpaired)]
    return found.effect, errors[0], _freedom(found.error**2, variance, dof), errors[1], ("prompts",)


def _freedom(known: float, estimated: float, dof: float) -> float:
    """Satterthwaite's degrees of freedom of a sum of a known variance and one estimated with `dof`."""
    return (known + estimated) ** 2 / (estimated**2 / dof) if estimated > 0 and np.isfinite(dof) else float("inf")


def _seeds_alone(noise: SeedNoise, pair: _Pair) -> float:
    """Variance of a difference at one size by what seeds do to any group of this metric."""
    return noise.variance * (1 / len(pair.a) + 1 / len(pair.b))


def contrast(
    a: Points,
    b: Points,
    fit_a: Fit | None,
    fit_b: Fit | None,
    at: str,
    level: float,
    own_protocols: bool = False,
    noise: SeedNoise | None = None,
) -> Contrast | None:
    """The difference a - b `at` the "smallest", "largest" or "all" sizes; None where they cannot be paired.

    One size: an interval from run-to-run and evaluation noise; where neither law nor own replicates say what another
    seed would give, `noise`, pooled over like groups, is the least. All sizes: Student's t over the paired
    differences.
    `own_protocols` also admits values of one unit that were measured under a protocol of each arm's own.
    """
    if not (comparable(a, b) or (own_protocols and a.metric == b.metric and a.unit == b.unit)):
        return None
    if (both := _at_common_data(a, b)) is None:
        return None
    a, b = both
    ranks_a, ranks_b = _by_rank(a), _by_rank(b)
    pairs = [_pair(a, b, i, j) for i, j in zip(ranks_a, ranks_b, strict=True)]
    between, fits = _between_seeds(pairs), (fit_a, fit_b)
    chosen = {"smallest": pairs[:1], "largest": pairs[-1:], "all": pairs}[at]
    rows = tuple(int(r) for p in chosen for r in (*a.rows[p.a], *b.rows[p.b]))
    sizes = [_one_size(a, b, p, between, fits) for p in chosen]
    if at == "all":
        if len(sizes) < 3:
            return None
        differences = np.array([s[0] for s in sizes])
        effect, dof, apart = float(differences.mean()), len(sizes) - 1.0, None
        by = sorted(set.intersection(*(set(s[4]) for s in sizes)))
        error = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    else:
        effect, error, dof, apart, by = sizes[0]
        unknown = between is None and fit_a is None and fit_b is None
        if noise is not None and unknown and (seeds := _seeds_alone(noise, chosen[0])) > error**2:
            error, dof, apart, by = float(np.sqrt(seeds)), float(noise.dof), None, ()
        if error == 0.0:
            return None
    half = two_sided(level, dof) * error
    by = [*(["seeds"] if all(p.seeded for p in chosen) else []), *by]
    return Contrast(
        a.metric, a.name, b.name, at, effect, effect - half, effect + half, len(chosen), rows,
        tuple(by), error, apart, detectable(error, dof, level),
    )  # fmt: skip


def draw(fit: Fit, count: int, rng: np.random.Generator) -> Array:
    """Parameter vectors (count, p) from the fit's multivariate t, kept inside the law's bounds."""
    # By eigenvalues: where a parameter is hardly held, rounding leaves the matrix short of what Cholesky demands.
    values, vectors = np.linalg.eigh(fit.covariance)
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    scale = np.sqrt(fit.within[1] / rng.chisquare(fit.within[1], size=(count, 1)))
    low, high = fit.law.bounds()
    return np.clip(fit.theta + scale * (rng.standard_normal((count, len(fit.theta))) @ root.T), low, high)


def _curves(fit: Fit, thetas: Array, x: Array) -> Array:
    return fit.law.evaluate(thetas, fit.coordinates(**{fit.law.axes[0]: x}))[0] * fit.scale


def _first_crossing(difference: Array, x: Array) -> Array:
    """Where each row of `difference` (B, n) first changes sign along x; NaN where it does not."""
    change = difference[:, :-1] * difference[:, 1:] < 0
    where = np.argmax(change, axis=1)
    rows = np.arange(len(difference))
    d0, d1 = difference[rows, where], difference[rows, where + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(change.any(1), d0 / (d0 - d1), np.nan)
    return np.exp(np.log(x[where]) + share * (np.log(x[where + 1]) - np.log(x[where])))


def crossing(a: Fit, b: Fit, level: float, rng: np.random.Generator) -> dict[str, Any] | None:
    """Where the laws of two arms meet along their common axis: point, interval, and how often they meet at all.

    None for unlike units or axes. The interval is over the draws that meet within REACH decades of the data.
    """
    if not comparable(a.points, b.points) or a.law.axes != b.law.axes or a.law.axes[1:]:
        return None
    axis = a.law.axes[0]
    values = np.concatenate([a.points.axis(axis), b.points.axis(axis)])
    x = np.geomspace(values.min() / 10**REACH, values.max() * 10**REACH, GRID)
    best = _first_crossing(_curves(a, a.theta[None], x) - _curves(b, b.theta[None], x), x)[0]
    met = _first_crossing(_curves(a, draw(a, DRAWS, rng), x) - _curves(b, draw(b, DRAWS, rng), x), x)
    share = float(np.isfinite(met).mean())
    tail = 50 * (1 - level)
    found = met[np.isfinite(met)]
    bounds = [float(v) for v in np.percentile(found, [tail, 100 - tail])] if share > 0.5 else None
    return {
        "metric": a.points.metric, "unit": a.points.unit, "a": a.points.name, "b": b.points.name, "axis": axis,
        "at": float(best) if np.isfinite(best) else None, "interval": bounds, "share_of_draws": share,
        "inside_data": bool(np.isfinite(best) and values.min() <= best <= values.max()),
        **crossings_by_seed(a, b, x, level),
    }  # fmt: skip


def crossings_by_seed(a: Fit, b: Fit, x: Array, level: float) -> dict[str, Any]:
    """Where the laws of each common seed meet, whose runs saw the same data in the same order, and their mean in log x.

    The interval is Student's t over the seeds, from three on that meet.
    """
    found = {}
    for seed in (s for s in a.by_seed if s in b.by_seed):
        first, second = (_curves(f, f.theta[None], x) for f in (a.by_seed[seed], b.by_seed[seed]))
        found[seed] = float(_first_crossing(first - second, x)[0])
    met = np.log([v for v in found.values() if np.isfinite(v)])
    if len(met) < 3:
        return {"by_seed": found, "paired_interval": None}
    half = two_sided(level, len(met) - 1) * float(met.std(ddof=1)) / np.sqrt(len(met))
    return {"by_seed": found, "paired_interval": [float(np.exp(met.mean() + s * half)) for s in (-1, 1)]}


def chance_of_best(fits: Sequence[Fit], places: Array, rng: np.random.Generator) -> list[dict[str, Any]]:
    """At each place along the fits' common axis: the probability that each arm's law is the best of all."""
    values = np.stack([_curves(f, draw(f, DRAWS, rng), places) for f in fits])
    best = values.argmax(0) if fits[0].points.kind == "score" else values.argmin(0)
    top = max(float(f.points.axis(f.law.axes[0]).max()) for f in fits)
    return [
        {
            "metric": fits[0].points.metric, "unit": fits[0].points.unit, "axis": fits[0].law.axes[0], "at": float(x),
            "decades": max(0.0, float(np.log10(x / top))),
            "chance": {f.points.name: float((best[:, i] == k).mean()) for k, f in enumerate(fits)},
        }
        for i, x in enumerate(places)
    ]  # fmt: skip


def by_unit(fits: Sequence[Fit]) -> list[list[Fit]]:
    """Fits whose metrics may be compared, together."""
    sets: dict[tuple[str, str, str], list[Fit]] = {}
    for f in fits:
        sets.setdefault((f.points.metric, f.points.unit, f.points.protocol), []).append(f)
    return [members for members in sets.values() if len(members) > 1]


def noises(points: Sequence[Points]) -> dict[tuple[str, str], SeedNoise | None]:
    """What a seed does, by metric and group: to variants of one arm alike, else to the metric in any arm."""
    top = [p.largest_data() for p in points]
    arms = pooled_by(top, lambda p: (p.metric, p.unit, p.group.get("token_kind"), p.group.get("order")))
    metrics = pooled_by(top, lambda p: (p.metric, p.unit))
    found = {}
    for p in points:
        known = (arms[p.metric, p.unit, p.group.get("token_kind"), p.group.get("order")], metrics[p.metric, p.unit])
        enough = (noise for noise in known if noise is not None and noise.dof >= FEW_REPLICATES)
        found[p.metric, p.name] = next(enough, None)
    return found


def comparisons(points: Sequence[Points], fits: Sequence[Fit], level: float) -> dict[str, list[dict[str, Any]]]:
    """All contrasts, crossings (along N and C) and chances of being best that the table allows."""
    one_axis = [f for f in fits if len(f.law.axes) == 1 and f.law.name in ("power-floor", "compute", "logit")]
    law_of = {(f.points.metric, f.points.name): f for f in one_axis if f.law.axes == ("n",)}
    noise_of = noises(points)
    contrasts, crossings, chances = [], [], []
    for a, b in combinations(points, 2):
        fit_a, fit_b = (law_of.get((p.metric, p.name)) for p in (a, b))
        # Of a single size the smallest is the largest.
        for at in ("smallest", "largest", "all") if len(np.unique(a.n)) > 1 else ("largest",):
            found = contrast(a, b, fit_a, fit_b, at, level, noise=noise_of[a.metric, a.name])
            if found is not None:
                contrasts.append(found.__dict__ | {"sign": found.sign})
    headline = [f for f in one_axis if not f.points.metric.startswith("geneval_")]
    for axis in ("n", "c"):
        for members in by_unit([f for f in headline if f.law.axes == (axis,)]):
            rng = np.random.default_rng(0)
            crossings += [c for a, b in combinations(members, 2) if (c := crossing(a, b, level, rng))]
            top = max(float(f.points.axis(axis).max()) for f in members)
            chances += chance_of_best(members, np.array([top / 10, top, top * 10]), rng)
    return {"contrasts": contrasts, "crossings": crossings, "chances": chances}
