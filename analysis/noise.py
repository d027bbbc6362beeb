"""Seed noise, measured from replicates: runs of one group at the same sizes that differ only in their seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.fit import Fit, Warned
from analysis.points import Points

# a law whose residual variance exceeds the replicates' at this level does not fit
LACK_OF_FIT_LEVEL = 0.01


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


def seed_noise(points: Points) -> SeedNoise | None:
    """Pooled over all cells (N, D) that hold two trunks or more; None without replicates."""
    y = points.y if points.kind in ("signed", "score") else np.log(points.y)
    cells = np.stack([np.nan_to_num(points.n), np.nan_to_num(points.d)], axis=1)
    squares, dof = 0.0, 0
    for cell in np.unique(cells, axis=0):
        here = (cells == cell).all(1)
        if len(np.unique(points.cluster[here])) > 1:
            squares += float(((y[here] - y[here].mean()) ** 2).sum())
            dof += int(here.sum()) - 1
    return SeedNoise(points.metric, points.name, squares / dof, dof) if dof else None


def pooled(noises: Sequence[SeedNoise]) -> SeedNoise | None:
    """One variance for several groups: replicates are few, and arms of one metric are alike."""
    dof = sum(noise.dof for noise in noises)
    if not dof:
        return None
    return SeedNoise(noises[0].metric, "all", sum(n.variance * n.dof for n in noises) / dof, dof)


def lack_of_fit(fit: Fit, noise: SeedNoise | None) -> list[Warned]:
    """A blocking remark where the residuals are larger than replicates allow: the law's form is wrong there."""
    if noise is None or not fit.objective.logarithmic or noise.variance == 0:
        return []
    ratio = (fit.within[0] + fit.between[0]) / noise.variance
    chance = float(stats.f.sf(ratio, fit.within[1], noise.dof))
    if chance > LACK_OF_FIT_LEVEL:
        return []
    message = f"residual variance is {ratio:.1f} times that between seeds (p = {chance:.1e}): the law misses the data"
    return [Warned("LACK_OF_FIT", message, True)]
