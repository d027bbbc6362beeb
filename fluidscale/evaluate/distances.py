"""Distances between two sets of features, in float64: Fréchet (FID and its kin), kernel distance, precision, recall.

Pure numbers: which network made the features, and of which images, is the business of `fid`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
from scipy.spatial.distance import cdist


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


def frechet_unbiased(features: np.ndarray, reference: Moments, splits: int = 3) -> float:
    """The distance as the number of images grows without bound (FID_inf, arXiv 1911.07023).

    At n images the expected distance is linear in 1/n to first order. It is averaged over 1, 2, .. `splits` disjoint
    parts and extrapolated. Only the bias of `features` (n, F) is removed: the reference stays as it is.
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


def precision_recall(features: np.ndarray, reference: np.ndarray, neighbour: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): the share of each set inside the other's manifold.

    A manifold is the union of balls reaching to each point's `neighbour`-th neighbour; both sets are cut to one size.
    """
    n = min(len(features), len(reference))
    x, y = np.asarray(features[:n], np.float64), np.asarray(reference[:n], np.float64)
    between = cdist(x, y)
    radius_x, radius_y = (np.partition(cdist(s, s), neighbour, axis=1)[:, neighbour] for s in (x, y))
    precision = (between <= radius_y[None, :]).any(axis=1).mean()
    recall = (between <= radius_x[:, None]).any(axis=0).mean()
    return float(precision), float(recall)


def _squared_mmd(features: np.ndarray, reference: np.ndarray) -> float:
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1.0) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy))
    return float(within - 2 * xy.mean())
