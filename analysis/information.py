"""What runs tell of a goal: the Gauss-Newton variance of its interval, with what lies between trunks and its dof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.distributions import t_quantile
from analysis.laws import Array
from analysis.variances import Spread

# a variance per draw (S,), or per draw and candidate (S, K), with its degrees of freedom, one or (K,)
Part = tuple[Array, Array]


@dataclass
class Side:
    """One arm's part of a goal over S draws of the parameters, with K candidates of T trunks.

    x is the gradient of the log of the law at a run. goal (S, p); information and meat (S, p, p) are the sums of x x'
    over runs and of s s' over trunks, where s, in `sums` (S, T, p), is a trunk's own sum of x; `runs` (T,) counts it.
    Candidates at one place are of one kind: `vectors` (S, kinds, p) are their x, zeros for runs of another arm.
    """

    goal: Array
    information: Array
    meat: Array
    sums: Array
    runs: np.ndarray
    vectors: Array
    kind: np.ndarray
    trunk: np.ndarray
    within: Spread
    between: Spread

    def copy(self) -> Side:
        """A side that takes other runs."""
        names = ("information", "meat", "sums", "runs")
        return replace(self, **{name: getattr(self, name).copy() for name in names})

    def add(self, index: int) -> None:
        """Takes a candidate in."""
        if not self._own[index]:
            return
        x, trunk = self.vectors[:, self.kind[index]], self.trunk[index]
        before = self.sums[:, trunk]
        self.information += _outer(x, x)
        self.meat += _outer(before + x, before + x) - _outer(before, before)
        self.sums[:, trunk] += x
        self.within, self.between = (
            (variance, float(dof[index]))
            for (variance, _), dof in zip((self.within, self.between), self._degrees_with_each(), strict=True)
        )
        self.runs[trunk] += 1

    def parts(self) -> list[Part]:
        """The goal's variance from within runs and, where there is any, from between trunks, (S,) each."""
        a = np.linalg.solve(self.information, self.goal[:, :, None])[:, :, 0]
        own = self.within[0] * (self.goal * a).sum(1), np.array(self.within[1])
        if not self.between[0]:
            return [own]
        shared = np.einsum("sp,spq,sq->s", a, self.meat, a)
        return [own, (self.between[0] * shared, np.array(self.between[1]))]

    def parts_with_each(self) -> list[Part]:
        """The same with each candidate alone added, (S, K) each (Sherman-Morrison)."""
        right = np.concatenate([self.goal[:, None], self.vectors], axis=1).transpose(0, 2, 1)
        solved, kind = np.linalg.solve(self.information, right), self.kind
        toward, spread = solved[:, :, 0], solved[:, :, 1:].transpose(0, 2, 1)
        along = (self.vectors * toward[:, None]).sum(2)
        rest = 1 + (self.vectors * spread).sum(2)
        own = (self.goal * toward).sum(1)[:, None] - along**2 / rest
        inner, outer = self._degrees_with_each()
        alone = self.within[0] * own[:, kind], inner
        if not self.between[0]:
            return [alone]
        # the solution and its product with x once x is in the information, kind by kind
        a, xa = toward[:, None] - spread * (along / rest)[:, :, None], along / rest
        shared = np.einsum("skp,spq,skq->sk", a, self.meat, a) + xa**2
        with_trunk = (self.sums[:, self.trunk] * a[:, kind]).sum(2)
        return [alone, (self.between[0] * (shared[:, kind] + 2 * with_trunk * xa[:, kind]), outer)]

    @property
    def _own(self) -> np.ndarray:
        """Which candidates are of this arm."""
        return self.kind < self.vectors.shape[1] - 1

    def _degrees_with_each(self) -> tuple[np.ndarray, np.ndarray]:
        """Degrees of freedom (K,) within and between with each candidate: a trunk's first run tells of trunks."""
        outer = self._own & (self.runs[self.trunk] == 0) & (self.between[0] > 0)
        return self.within[1] + (self._own & ~outer), self.between[1] + outer


def half_widths(parts: Sequence[Part], level: float) -> Array:
    """Half-widths of an interval whose variance has these parts, with Welch and Satterthwaite's dof (a mean one over
    the draws: they differ little, and quantiles are what takes the time)."""
    total = sum(np.maximum(variance, 0.0) for variance, _ in parts)
    assert isinstance(total, np.ndarray)
    total = np.maximum(total, 1e-300)
    shares = sum((variance / total) ** 2 / np.maximum(dof, 1e-9) for variance, dof in parts)
    assert isinstance(shares, np.ndarray)
    dof, which = np.unique(np.atleast_1d(1 / shares.mean(0)).round(6), return_inverse=True)
    return t_quantile(0.5 + level / 2, dof)[which] * np.sqrt(total)


def _outer(left: Array, right: Array) -> Array:
    return left[:, :, None] * right[:, None, :]
