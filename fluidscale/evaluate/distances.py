"""Distances between two sets of features, in float64: Fréchet (FID and its kin), kernel distance, precision, recall.

Pure numbers: which network made the features, and of which images, is the business of `fid`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg


@dataclass(frozen=True)
class Moments:
    """Mean (F,) and unbiased covariance (F, F) of n feature vectors: all that a Fréchet distance needs."""

    mean: np.ndarray
    cov: np.ndarray
    n: int

    @cached_property
    def root(self) -> np.ndarray:
        """R (F, rank) with R R^T = cov; directions whose variance is rounding noise are dropped.

        Kept: a reference meets many sets, and at 2048 features this is most of a distance's work.
        """
        width = len(self.cov)
        # n vectors span n - 1 directions: the others need not be looked for.
        last = (max(width - self.n, 0), width - 1)
        values, vectors = scipy.linalg.eigh((self.cov + self.cov.T) / 2, subset_by_index=last)
        kept = values > values[-1] * width * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


def moments(features: np.ndarray) -> Moments:
    """Moments of features (n, F), n >= 2."""
    features = np.asarray(features, dtype=np.float64)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least two images, got {len(features)}")
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians (Dowson and Landau 1982; FID: arXiv 1706.08500).

    tr (A^1/2 B A^1/2)^1/2 is the sum of singular values of A^1/2 B^1/2. Taken from there, and not from eigenvalues of
    A B, no square root is drawn of rounding noise, so the result holds for singular covariances too.
    """
    cross = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    shift = a.mean - b.mean
    return max(float(shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2 * cross), 0.0)


# Images a feature below which the extrapolation takes back too much (benchmarks/fid_inf.md).
LEAST_IMAGES_A_FEATURE = 8


def frechet_unbiased(features: np.ndarray, reference: Moments, splits: int = 3) -> float:
    """The distance as the number of images grows without bound (FID_inf, arXiv 1911.07023).

    At n images the expected distance is linear in 1/n to first order. It is averaged over 1, 2, .. `splits` disjoint
    parts and extrapolated. Only the bias of `features` (n, F) is removed: the reference stays as it is. Below
    LEAST_IMAGES_A_FEATURE the terms beyond 1/n, which remain, are as large as the distance.
    """
    inverse_n, values, weights = [], [], []
    for parts in range(1, splits + 1):
        chunks = [features[k::parts] for k in range(parts)]
        inverse_n.append(float(np.mean([1 / len(c) for c in chunks])))
        values.append(float(np.mean([frechet(moments(c), reference) for c in chunks])))
        # Smaller parts carry the higher-order terms of the bias; the full set carries none of the averaging.
        weights.append(1 / parts)
    slope_and_intercept = np.polyfit(inverse_n, values, 1, w=np.sqrt(weights))
    return float(slope_and_intercept[1])


def jackknife(features: np.ndarray, estimate: Callable[[np.ndarray], float], groups: int = 20) -> float:
    """Standard error of estimate(features) from leaving out one of `groups` interleaved groups at a time.

    Covers the draw of `features` (n, F) alone: a reference that all models share is a constant of the comparison.
    """
    groups = min(groups, len(features) // 2)
    kept = np.arange(len(features)) % groups
    left_out = np.array([estimate(features[kept != g]) for g in range(groups)])
    return float(np.sqrt((groups - 1) / groups * np.sum((left_out - left_out.mean()) ** 2)))


def kernel_distance(features: np.ndarray, reference: np.ndarray, blocks: int = 10) -> tuple[float, float]:
    """KID: unbiased squared MMD under the kernel (x.y / F + 1)^3 (arXiv 1801.01401), with its standard error.

    The mean over disjoint blocks of both sets: unbiased at any size, and the blocks say how sure it is.
    """
    blocks = min(blocks, len(features) // 2)
    values = [_squared_mmd(features[b::blocks], reference[b::blocks]) for b in range(blocks)]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(blocks)) if blocks > 1 else np.nan


def precision_recall(
    features: np.ndarray, reference: np.ndarray, neighbour: int = 3, groups: int = 10
) -> tuple[float, float, float]:
    """Improved precision and recall (arXiv 1904.06991), the share of each set inside the other's manifold, and the
    standard error of recall, from leaving out one of `groups` interleaved groups of `features` at a time.

    A manifold is the union of balls reaching to each point's `neighbour`-th neighbour; both sets are cut to one size.
    Distances come in blocks of rows, once for everything: memory is bounded at any number of images.
    """
    n = min(len(features), len(reference))
    groups, centre = min(groups, n // 2), np.asarray(reference[:n], np.float64).mean(0)
    x, y = (np.asarray(one[:n], np.float64) - centre for one in (features, reference))
    member = np.arange(n) % groups == np.arange(groups)[:, None]
    everybody = np.zeros((1, n), bool)
    radii_x = _squared_radii(x, neighbour, np.concatenate([everybody, member]))
    radii_y = _squared_radii(y, neighbour, everybody)[0]
    precise, covered = np.zeros(n, bool), np.zeros((groups + 1, n), bool)
    for rows, squared in _squared_distances(x, y):
        precise[rows] = (squared <= radii_y).any(axis=1)
        for without, radii in enumerate(radii_x):
            covered[without] |= (squared <= radii[rows, None]).any(axis=0)
    shares = covered.mean(axis=1)
    recall, left_out = shares[0], shares[1:]
    error = np.sqrt((groups - 1) / groups * np.sum((left_out - np.mean(left_out)) ** 2))
    return float(precise.mean()), float(recall), float(error)


# Distances held at a time (128 MB); neighbours kept beyond the one that is asked for, some of which are left out.
_BLOCK, _SPARE = 2**24, 24


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances (rows, m) of x (n, F) to y (m, F), block by block of rows."""
    norms, size = (y**2).sum(1), max(1, _BLOCK // len(y))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        squared = x[rows] @ y.T
        squared *= -2
        squared += (x[rows] ** 2).sum(1)[:, None]
        squared += norms
        yield rows, np.maximum(squared, 0, out=squared)


def _squared_radii(x: np.ndarray, neighbour: int, left_out: np.ndarray) -> np.ndarray:
    """Squared distance (G, n) of each point to its `neighbour`-th neighbour, where those of each row of `left_out`,
    bool (G, n), are not there; -1 for these themselves."""
    n = len(x)
    kept, radii = min(neighbour + _SPARE, n - 1), np.empty(left_out.shape)
    for rows, squared in _squared_distances(x, x):
        here = np.arange(rows.start, rows.stop)
        squared[here - rows.start, here] = -1.0  # each first of its own neighbours
        nearest = np.argpartition(squared, kept, axis=1)[:, : kept + 1]
        distance = np.take_along_axis(squared, nearest, axis=1)
        order = distance.argsort(axis=1)
        nearest, distance = (np.take_along_axis(part, order, axis=1) for part in (nearest, distance))
        for group, missing in enumerate(left_out):
            there = np.cumsum(~missing[nearest], axis=1)
            place = np.minimum((there <= neighbour).sum(axis=1), kept)
            radii[group, rows] = np.where(missing[here], -1.0, distance[here - rows.start, place])
    return radii


def _squared_mmd(features: np.ndarray, reference: np.ndarray) -> float:
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1.0) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * xy.mean())
