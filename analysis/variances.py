"""Variances of a fit's residuals, within a run and between trunks, and the least that replicates show of either."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.laws import Array, Law
from analysis.points import Points

# a variance with its degrees of freedom
Spread = tuple[float, float]
# parameters of joint laws that rows of one trunk identify among themselves; all others are told apart between trunks
DATA_PARAMETERS = ("b", "beta", "q", "alpha_D")
# fewer trunks do not tell how far one trunk's runs lie from another's
ENOUGH_TRUNKS = 3


@dataclass(frozen=True)
class SeedVariance:
    """Variances that replicates show, in the objective's residual units: within a trunk and between trunks, their dof.

    An evaluation on common draws shifts all runs alike, so replicates hold a run's seed noise together with what is
    left of the evaluation's error once models are compared in pairs. 0 dof: no replicates.
    """

    within: float = 0.0
    between: float = 0.0
    dof: float = 0.0

    @property
    def total(self) -> float:
        """Variance of one run around its cell's mean."""
        return self.within + self.between


NO_SEEDS = SeedVariance()


def _between_parameters(law: Law, points: Points, codes: np.ndarray, frozen: np.ndarray) -> int:
    """How many of the free parameters only a comparison of trunks tells.

    Along one axis all of them, unless each trunk runs along most of that axis itself: then it is the level alone.
    """
    free = [name for name, held in zip(law.parameters, frozen, strict=True) if not held]
    if law.axes[1:]:
        return sum(name not in DATA_PARAMETERS for name in free)
    places = np.unique(np.round(np.log(points.axis(law.axes[0])), 6), return_inverse=True)[1]
    least = min(len(np.unique(places[codes == trunk])) for trunk in range(codes.max() + 1))
    return 1 if 2 * least > places.max() + 1 else len(free)


def _degrees(law: Law, points: Points, codes: np.ndarray, frozen: np.ndarray) -> tuple[int, int]:
    """Degrees of freedom (between trunks, within them) that the parameters leave."""
    groups, between = codes.max() + 1, _between_parameters(law, points, codes, frozen)
    return int(groups) - between, len(points) - int(groups) - (int((~frozen).sum()) - between)


def trunks_of(points: Points) -> np.ndarray:
    """The number of each point's trunk (n,), from 0."""
    return np.unique(points.cluster, return_inverse=True)[1]


def has_branches(points: Points) -> bool:
    """Whether a trunk holds several rows."""
    return len(np.unique(points.cluster)) < len(points)


def too_few_trunks(law: Law, points: Points, frozen: np.ndarray, seeds: SeedVariance) -> bool:
    """Whether rows share trunks and nothing, not even replicates, tells how far one trunk lies from another."""
    codes = trunks_of(points)
    if not has_branches(points) or seeds.dof:
        return False
    return codes.max() + 1 < ENOUGH_TRUNKS or _degrees(law, points, codes, frozen)[0] < 1


def _at_least(own: Spread, seeds: float, dof: float) -> Spread:
    """A variance with its dof, raised to what replicates show: the estimate that stands brings its own dof."""
    return own if own[0] >= seeds else (seeds, max(own[1], dof))


def variances(
    law: Law, points: Points, residual: Array, weights: Array, frozen: np.ndarray, seeds: SeedVariance
) -> tuple[Spread, Spread]:
    """((within, dof), (between, dof)): mean squares of the residuals; between is 0 where no trunk holds two rows.

    Neither is less than what `seeds` show: few residual degrees of freedom can be small by luck. Where trunks are too
    few to tell, what lies between them is what seeds show.
    """
    n, free = len(points), int((~frozen).sum())
    mean_square = float((weights * residual**2).sum() / (n - free))
    pooled = _at_least((mean_square, float(n - free)), seeds.total, seeds.dof)
    if not has_branches(points):
        return pooled, (0.0, 0.0)
    codes = trunks_of(points)
    counts = np.bincount(codes)
    dof_between, dof_within = _degrees(law, points, codes, frozen)
    if dof_within < 1 or (dof_between < 1 and not seeds.dof):
        return pooled, (0.0, 0.0)
    means = np.bincount(codes, residual) / counts
    within = float(((residual - means[codes]) ** 2).sum() / dof_within)
    own = (0.0, 0.0)
    if dof_between >= 1:
        between = float((counts * means**2).sum() / dof_between)
        own = (between - within) / float(counts.mean()), float(dof_between)
    apart = _at_least(own, seeds.between, seeds.dof)
    if apart[0] <= 0.0:
        return pooled, (0.0, 0.0)
    return _at_least((within, float(dof_within)), seeds.within, seeds.dof), apart
