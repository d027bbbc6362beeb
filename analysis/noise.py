"""Seed noise, measured from replicates: runs of one group at the same sizes that differ only in their seed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.distributions import f_tail
from analysis.fit import DESIGN_EFFECT, Fit, Warned, scale_of
from analysis.laws import Array
from analysis.points import Points
from analysis.variances import NO_SEEDS, SeedVariance, trunks_of

# a law whose residual variance exceeds the replicates' at this level does not fit
LACK_OF_FIT_LEVEL = 0.01
# a variance from fewer degrees of freedom is too loose to overrule the residuals: its 95 % range spans a factor 40
FEW_REPLICATES = 3


@dataclass(frozen=True)
class SeedNoise:
    """Variance between runs that differ only in seed: of log y (raw y for signed metrics and scores), with its dof."""

    metric: str
    group: str
    variance: float
    dof: int

    @property
    def relative(self) -> float:
        """Standard deviation; for log metrics the relative one."""
        return float(np.sqrt(self.variance))


def _cells(points: Points) -> Array:
    """(n, 2): size and data size, 0 where the table has no such column."""
    return np.stack([np.nan_to_num(points.n), np.nan_to_num(points.d)], axis=1)


def _replicates(points: Points) -> bool:
    """Whether points of one size are trunks that differ in their seed: two of one seed differ in something else."""
    trunks, first = np.unique(points.cluster, return_index=True)
    seeds = points.seed[first]
    return len(trunks) > 1 and (len(np.unique(seeds)) == len(trunks) or not any(seeds))


def _comparisons(cells: np.ndarray, trunks: np.ndarray) -> int:
    """Independent comparisons between trunks, given each row's cell and trunk: what trunks tell beyond the cells.

    trunks - cells where every row is a trunk of its own; branches of one trunk in several cells add none.
    """
    linked = cells
    while True:
        least = linked
        for labels in (trunks, cells):
            lowest = np.full(labels.max() + 1, cells.max())
            np.minimum.at(lowest, labels, least)
            least = lowest[labels]
        if (least == linked).all():
            return len(np.unique(trunks)) - len(np.unique(linked))
        linked = least


def seed_noise(points: Points) -> SeedNoise | None:
    """Pooled over all cells (N, D) that hold two trunks or more; None without replicates."""
    y = points.y if points.kind in ("signed", "score") else np.log(points.y)
    cells = np.unique(_cells(points), axis=0, return_inverse=True)[1].ravel()
    kept = [c for c in np.unique(cells) if (cells == c).sum() > 1 and _replicates(points.take(cells == c))]
    if not kept:
        return None
    squares = sum(float(((y[cells == c] - y[cells == c].mean()) ** 2).sum()) for c in kept)
    used = np.isin(cells, kept)
    dof = _comparisons(cells[used], trunks_of(points)[used])
    return SeedNoise(points.metric, points.name, squares / (int(used.sum()) - len(kept)), dof)


def unlike(noises: Sequence[SeedNoise]) -> tuple[SeedNoise, SeedNoise] | None:
    """The quietest and the noisiest group where their variances clearly differ, else None."""
    known = sorted((n for n in noises if n.dof >= FEW_REPLICATES), key=lambda n: n.variance)
    if len(known) < 2 or known[0].variance == 0:
        return None
    low, high = known[0], known[-1]
    # the most unlike pair was picked among all ordered pairs
    pairs = len(known) * (len(known) - 1)
    chance = pairs * f_tail(high.variance / low.variance, high.dof, low.dof)
    return (low, high) if chance < LACK_OF_FIT_LEVEL else None


def pooled(noises: Sequence[SeedNoise]) -> SeedNoise | None:
    """One variance for several groups: replicates are few, and arms of one metric are alike."""
    dof = sum(noise.dof for noise in noises)
    if not dof:
        return None
    return SeedNoise(noises[0].metric, "all", sum(n.variance * n.dof for n in noises) / dof, dof)


def of_form(points: Sequence[Points]) -> dict[tuple[str, str], SeedNoise | None]:
    """What laws are held to, by metric and group: groups of one unit pooled, or each its own where they are unlike."""
    found = {(p.metric, p.name): seed_noise(p) for p in points}
    out: dict[tuple[str, str], SeedNoise | None] = {}
    for p in points:
        alike = [n for q in points if (q.metric, q.unit) == (p.metric, p.unit) and (n := found[q.metric, q.name])]
        own = found[p.metric, p.name]
        out[p.metric, p.name] = own if own is not None and unlike(alike) else pooled(alike)
    return out


def pooled_by(points: Sequence[Points], key: Callable[[Points], Hashable]) -> dict[Hashable, SeedNoise | None]:
    """`seed_noise` pooled over the groups of one key, the metric or more than that; None where nothing was repeated."""
    found: dict[Hashable, list[SeedNoise]] = {key(p): [] for p in points}
    for p in points:
        if (noise := seed_noise(p)) is not None:
            found[key(p)].append(noise)
    return {name: pooled(noises) for name, noises in found.items()}


def _deviations(points: Points) -> Array:
    """Values whose spread within a cell is that of the default objective's weighted residuals."""
    if points.kind == "score":
        middle = np.empty(len(points))
        cells = _cells(points)
        for cell in np.unique(cells, axis=0):
            here = (cells == cell).all(1)
            middle[here] = points.y[here].mean()
        error = np.sqrt(np.maximum(middle * (1 - middle), 1e-12) * DESIGN_EFFECT / points.count)
        return points.y / np.where(np.isfinite(points.se), points.se, error)
    return points.y / scale_of(points) if points.kind == "signed" else np.log(points.y)


def _table(points: Points, values: Array) -> Array | None:
    """(trunks, data sizes) of one size: the data sizes that all of its trunks carry; None without replicates."""
    trunks, codes = np.unique(points.cluster, return_inverse=True)
    levels, places = np.unique(np.nan_to_num(points.d), return_inverse=True)
    out = np.full((len(trunks), len(levels)), np.nan)
    out[codes, places] = values
    out = out[:, np.isfinite(out).all(0)]
    return out if _replicates(points) and out.shape[1] else None


def seed_variance(groups: Sequence[Points]) -> SeedVariance:
    """Analysis of variance over the replicated sizes of `groups`, pooled: seeds at equal (N, D), one trunk each.

    With a single data size a trunk's own noise cannot be told from its runs': all of it then counts as between.
    """
    between = within = dof_between = dof_within = rows = 0.0
    for points in groups:
        values = _deviations(points)
        for size in np.unique(points.n):
            here = points.n == size
            if len(np.unique(points.cluster[here])) < 2:
                continue
            table = _table(points.take(here), values[here])
            if table is None:
                continue
            rest = table - table.mean(0)
            shift = rest.mean(1, keepdims=True)
            trunks, levels = table.shape
            between += float(levels * (shift**2).sum())
            within += float(((rest - shift) ** 2).sum())
            dof_between += trunks - 1
            dof_within += (trunks - 1) * (levels - 1)
            rows += levels * (trunks - 1)
    if dof_between < FEW_REPLICATES:
        return NO_SEEDS
    noise = within / dof_within if dof_within else 0.0
    apart = max(between / dof_between - noise, 0.0) / (rows / dof_between)
    return SeedVariance(noise, apart, dof_between)


def replicated(points: Sequence[Points]) -> dict[tuple[str, str, str], SeedVariance]:
    """`seed_variance` by metric, kind and group: groups of one unit pooled, or each its own where they are unlike."""
    sets: dict[tuple[str, str, str], list[Points]] = {}
    for p in points:
        sets.setdefault((p.metric, p.unit, p.kind), []).append(p)
    out = {}
    for (metric, _, kind), members in sets.items():
        alike = [p.alike() for p in members]
        whole = seed_variance(alike)
        apart = unlike([noise for p in alike if (noise := seed_noise(p)) is not None])
        for p, mine in zip(members, alike, strict=True):
            own = seed_variance([mine]) if apart else whole
            out[metric, kind, p.name] = own if own.dof else whole
    return out


def lack_of_fit(fit: Fit, noise: SeedNoise | None) -> list[Warned]:
    """A blocking remark where the residuals are larger than replicates allow: the law's form is wrong there."""
    if noise is None or not fit.objective.logarithmic or noise.variance == 0:
        return []
    parts = [(variance, dof) for variance, dof in (fit.within, fit.between) if variance > 0]
    total = sum(variance for variance, _ in parts)
    if not total:
        return []
    ratio = total / noise.variance
    # Satterthwaite: a variance between trunks counts trunks
    dof = total**2 / sum(variance**2 / dof for variance, dof in parts)
    chance = f_tail(ratio, dof, noise.dof)
    if chance > LACK_OF_FIT_LEVEL:
        return []
    message = f"residual variance is {ratio:.1f} times that between seeds (p = {chance:.1e}): the law misses the data"
    return [Warned("LACK_OF_FIT", message, True)]
