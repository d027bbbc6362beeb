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
from analysis.crossings import chance_of_best, crossing
from analysis.distributions import t_quantile, two_sided
from analysis.fit import Fit
from analysis.images import aligned, paired_error
from analysis.laws import Array
from analysis.noise import FEW_REPLICATES, SeedNoise, pooled_by
from analysis.points import Points, comparable, data_levels
from analysis.table import AXES, is_part

# the usual power of a planned comparison (Cohen 1988, Statistical Power Analysis, 2.4)
POWER = 0.8
# arms without named sizes: parameters within this share are one size; published ladders step by 1.4 and more
SAME_SIZE = 0.15


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


# What a seed does to each of two arms, where replicates show it.
Noises = tuple[SeedNoise | None, SeedNoise | None]


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


def _common_sizes(a: Points, b: Points) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices of both arms' points of each size that both have, smallest first.

    Sizes go by name, since a head and a vocabulary count among an arm's parameters; where names do not tell them, by N:
    each with the nearest of the other arm within SAME_SIZE.
    """
    if not (len(a) and len(b) and np.isfinite([*a.n, *b.n]).all()):
        return []
    n, m = np.unique(a.n), np.unique(b.n)
    of_a, of_b = (np.array([p.sizes.get(int(row), "") for row in p.rows]) for p in (a, b))
    named = (of_a != "").all() and (of_b != "").all()
    if named and len(np.unique(of_a)) == len(n) and len(np.unique(of_b)) == len(m):
        same = [(name, name) for name in np.intersect1d(of_a, of_b)]
    else:
        of_a, of_b = a.n, b.n
        apart = np.abs(np.log(n[:, None] / m))
        near = [(i, j) for i, j in enumerate(apart.argmin(1)) if apart[:, j].argmin() == i]
        same = [(n[i], m[j]) for i, j in near if apart[i, j] <= np.log1p(SAME_SIZE)]
    pairs = [(np.flatnonzero(of_a == x), np.flatnonzero(of_b == y)) for x, y in same]
    return sorted(pairs, key=lambda pair: float(a.n[pair[0]].min()))


def _at_common_data(a: Points, b: Points) -> tuple[Points, Points] | None:
    """Each size that both have at the largest data size that both have there; None where there is no such size.

    Where every size has a single one in either arm, as where data grow with the models, sizes are paired as they are.
    """
    sizes = _common_sizes(a, b)
    if not sizes:
        return None
    levels = data_levels(np.nan_to_num(np.concatenate([a.d, b.d])))
    of_a, of_b = levels[: len(a)], levels[len(a) :]
    shared = [np.concatenate(side) for side in zip(*sizes, strict=True)]
    grows = len(set(of_a[shared[0]])) == len(set(of_b[shared[1]])) == len(sizes)
    kept: list[list[np.ndarray]] = []
    for i, j in sizes:
        common = set(of_a[i]) & set(of_b[j])
        if not common and not (grows and len(set(of_a[i])) == len(set(of_b[j])) == 1):
            return None
        kept.append([i[of_a[i] == max(common)], j[of_b[j] == max(common)]] if common else [i, j])
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
    lent = fits[0] is fits[1] and fits[0] is not None
    for points, at, fit in zip((a, b), (pair.a, pair.b), fits, strict=True):
        if points.kind == "score":
            variance += _evaluation(points, at) * (fit.seeds.total if fit is not None else 0.0)
            dof += fit.seeds.dof if fit is not None else 0.0
        else:
            spread, freedom = _run_variance(points, fit)
            variance += float(spread[at].mean()) / len(at)
            dof += freedom
    # One law's scatter, said twice, is known no better for it.
    return variance, (dof / 2 if lent else dof) or float("inf")


def _borrowed(fits: Sequence[Fit | None], noises: Noises) -> list[Fit | None]:
    """The laws that say how much a run scatters: of an arm with neither law nor replicates, the other arm's."""
    lent = [other if noise is None else None for other, noise in zip(fits[::-1], noises, strict=True)]
    return [fit or other for fit, other in zip(fits, lent, strict=True)]


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


def _seeds_alone(noises: Noises, fits: Sequence[Fit | None], pair: _Pair) -> tuple[float, float] | None:
    """(standard error, dof) of a difference at one size by what seeds do to the arms that have no law to say so."""
    sides = zip(noises, fits, (pair.a, pair.b), strict=True)
    parts = [(noise, noise.variance / len(at)) for noise, fit, at in sides if fit is None and noise is not None]
    total = sum(variance for _, variance in parts)
    if not total:
        return None
    if len({id(noise) for noise, _ in parts}) == 1:
        return float(np.sqrt(total)), float(parts[0][0].dof)
    return float(np.sqrt(total)), total**2 / sum(variance**2 / noise.dof for noise, variance in parts)


def contrast(
    a: Points,
    b: Points,
    fit_a: Fit | None,
    fit_b: Fit | None,
    at: str,
    level: float,
    own_protocols: bool = False,
    noises: Noises = (None, None),
) -> Contrast | None:
    """The difference a - b `at` the "smallest", "largest" or "all" sizes of both; None where none can be paired.

    One size: an interval from run-to-run and evaluation noise; where neither an arm's law nor the pair's own
    replicates say what another seed would give, `noises` of the two, pooled over like groups, are the least. All
    sizes: Student's t over the paired differences.

    `own_protocols` also admits values of one unit that were measured under a protocol of each arm's own.
    """
    both = _at_common_data(a, b) if a.metric == b.metric and a.unit == b.unit else None
    if both is None:
        return None
    a, b = both
    if not (own_protocols or comparable(a, b)):
        return None
    pairs = [_pair(a, b, i, j) for i, j in _common_sizes(a, b)]
    between, fits = _between_seeds(pairs), _borrowed((fit_a, fit_b), noises)
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
        seeds = _seeds_alone(noises, fits, chosen[0]) if between is None else None
        if seeds is not None and two_sided(level, seeds[1]) * seeds[0] > two_sided(level, dof) * error:
            (error, dof), apart, by = seeds, None, ()
        if error == 0.0:
            return None
    half = two_sided(level, dof) * error
    by = [*(["seeds"] if all(p.seeded for p in chosen) else []), *by]
    return Contrast(
        a.metric, a.name, b.name, at, effect, effect - half, effect + half, len(chosen), rows,
        tuple(by), error, apart, detectable(error, dof, level),
    )  # fmt: skip


def by_unit(fits: Sequence[Fit]) -> list[list[Fit]]:
    """Fits whose metrics may be compared, together."""
    sets: dict[tuple[str, str, str], list[Fit]] = {}
    for f in fits:
        sets.setdefault((f.points.metric, f.points.unit, f.points.protocol), []).append(f)
    return [members for members in sets.values() if len(members) > 1]


def noises(points: Sequence[Points]) -> dict[tuple[str, str], SeedNoise | None]:
    """What a seed does, by metric and group: to variants of one arm alike, else to the metric in any arm."""

    def metric(p: Points) -> tuple[str, str]:
        return p.metric, p.unit

    def arm(p: Points) -> tuple[str | None, ...]:
        return (*metric(p), p.group.get("token_kind"), p.group.get("order"))

    top = [p.largest_data() for p in points]
    arms, metrics = pooled_by(top, arm), pooled_by(top, metric)
    found = {}
    for p in points:
        known = [noise for noise in (arms[arm(p)], metrics[metric(p)]) if noise is not None]
        # A loose variance makes a wide interval; none at all, one that is too narrow.
        enough = [noise for noise in known if noise.dof >= FEW_REPLICATES] or known[-1:]
        found[p.metric, p.name] = enough[0] if enough else None
    return found


def along_one_axis(fits: Sequence[Fit]) -> list[Fit]:
    """Each arm's own law along N and along C, or along D of a ladder of data sizes."""
    return [f for f in fits if len(f.law.axes) == 1 and f.law.name in ("power-floor", "compute", "logit")]


def _of_two_orders(fits: Sequence[Fit], level: float) -> list[dict[str, Any]]:
    """Where the likelihoods of one token kind's two orders meet: each order has a protocol of its own."""
    signed = [f for f in fits if f.points.kind == "signed"]
    pairs = [(a, b) for a, b in combinations(signed, 2) if a.points.protocol != b.points.protocol]
    rng = np.random.default_rng(0)
    return [c for a, b in pairs if (c := crossing(a, b, level, rng))]


def comparisons(points: Sequence[Points], fits: Sequence[Fit], level: float) -> dict[str, list[dict[str, Any]]]:
    """All contrasts, crossings (along N, C or D) and chances of being best that the table allows."""
    one_axis = along_one_axis(fits)
    # How runs scatter, a law along N says. One along D does not: its runs share a trunk.
    law_of = {(f.points.metric, f.points.name): f for f in one_axis if f.law.axes == ("n",)}
    noise_of = noises(points)
    contrasts, crossings, chances = [], [], []
    for a, b in combinations(points, 2):
        fit_a, fit_b = (law_of.get((p.metric, p.name)) for p in (a, b))
        both = noise_of[a.metric, a.name], noise_of[b.metric, b.name]
        each = (contrast(a, b, fit_a, fit_b, at, level, noises=both) for at in ("smallest", "largest", "all"))
        found = [c for c in each if c is not None]
        # Of a single common size the smallest is the largest.
        single = len({c.rows for c in found}) < len(found)
        contrasts += [c.__dict__ | {"sign": c.sign} for c in found[single:]]
    headline = [f for f in one_axis if not is_part(f.points.metric)]
    for axis in AXES:
        along = [f for f in headline if f.law.axes == (axis,)]
        crossings += _of_two_orders(along, level)
        for members in by_unit(along):
            rng = np.random.default_rng(0)
            crossings += [c for a, b in combinations(members, 2) if (c := crossing(a, b, level, rng))]
            top = max(float(f.points.axis(axis).max()) for f in members)
            chances += chance_of_best(members, np.array([top / 10, top, top * 10]), rng)
    return {"contrasts": contrasts, "crossings": crossings, "chances": chances}
