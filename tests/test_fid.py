"""Distances against references that share no code with them, and standard errors against what really varies."""

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist

from fluidscale.evaluate import distances, fid
from fluidscale.evaluate.distances import (
    Moments,
    frechet,
    frechet_unbiased,
    jackknife,
    kernel_distance,
    moments,
    precision_recall,
)


def random_moments(rng: np.random.Generator, width: int, n: int = 500) -> Moments:
    mixing = rng.normal(size=(width, width)) / np.sqrt(width)
    return moments(rng.normal(size=(n, width)) @ mixing + rng.normal(size=width))


def high_precision(a: Moments, b: Moments) -> float:
    """The definition, tr (A + B - 2 (A B)^1/2), with 50 digits."""
    with mpmath.workdps(50):
        product = mpmath.matrix(a.cov.tolist()) * mpmath.matrix(b.cov.tolist())
        eigenvalues = mpmath.eig(product, left=False, right=False)
        cross = sum(mpmath.sqrt(mpmath.re(e)) for e in eigenvalues)
        shift = sum(mpmath.mpf(float(d)) ** 2 for d in a.mean - b.mean)
        return float(shift + sum(mpmath.mpf(float(v)) for v in np.diag(a.cov + b.cov)) - 2 * cross)


@pytest.mark.parametrize("width", [2, 7, 12])
def test_equals_the_definition_in_high_precision(width):
    rng = np.random.default_rng(width)
    a, b = random_moments(rng, width), random_moments(rng, width)
    assert frechet(a, b) == pytest.approx(high_precision(a, b), abs=1e-10)


def test_equals_sqrtm_where_that_is_stable():
    rng = np.random.default_rng(0)
    a, b = random_moments(rng, 64), random_moments(rng, 64)
    root = scipy.linalg.sqrtm(a.cov @ b.cov)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * root.real)
    assert frechet(a, b) == pytest.approx(expected, abs=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), abs=1e-9)


def test_singular_covariances_give_what_their_subspace_gives():
    # 5 numbers seen through 60 features: the distance must not notice the 55 empty directions.
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(60, 5)))[0]
    x, y = rng.normal(size=(40, 5)), 1.5 * rng.normal(size=(30, 5)) + 0.3
    expected = frechet(moments(x), moments(y))
    assert frechet(moments(x @ basis.T), moments(y @ basis.T)) == pytest.approx(expected, abs=1e-6)


def test_fewer_images_than_features_stays_exact():
    rng = np.random.default_rng(2)
    few = moments(rng.normal(size=(10, 200)))
    assert frechet(few, few) == pytest.approx(0, abs=1e-9)
    shifted = Moments(few.mean + 2.0, few.cov, few.n)
    assert frechet(few, shifted) == pytest.approx(200 * 4.0, rel=1e-9)


def test_constant_features_have_only_their_shift():
    a, b = moments(np.zeros((5, 3))), moments(np.ones((5, 3)))
    assert frechet(a, b) == pytest.approx(3.0)


def test_diagonal_closed_form():
    a = Moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]), 100)
    b = Moments(np.ones(3), np.diag([4.0, 4.0, 0.0]), 100)
    assert frechet(a, b) == pytest.approx(3 + 1 + 0 + 9, abs=1e-12)


def test_agrees_with_torchmetrics_on_a_custom_feature_module():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pool(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)

    rng = np.random.default_rng(3)
    real, fake = (rng.integers(low, 256, (64, 3, 16, 16), dtype=np.uint8) for low in (0, 90))
    metric = FrechetInceptionDistance(feature=Pool(), input_img_size=(3, 16, 16))
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    ours = frechet(*(moments(Pool()(torch.from_numpy(images)).numpy()) for images in (fake, real)))
    assert ours == pytest.approx(float(metric.compute()), abs=1e-6)


def test_extrapolation_removes_the_bias_of_the_drawn_side():
    width, n, repeats = 16, 256, 60
    rng = np.random.default_rng(4)
    reference = Moments(np.zeros(width), np.eye(width), 10**9)
    truth = width * 0.25
    draws = [rng.normal(size=(n, width)) + 0.5 for _ in range(repeats)]
    biased = np.array([frechet(moments(d), reference) for d in draws])
    unbiased = np.array([frechet_unbiased(d, reference) for d in draws])
    error = unbiased.std(ddof=1) / np.sqrt(repeats)
    assert biased.mean() - truth > 5 * error
    assert abs(unbiased.mean() - truth) < 0.1 * (biased.mean() - truth) + 3 * error


@pytest.mark.parametrize("estimate", ["fixed", "unbiased"])
def test_the_stated_error_is_the_real_one(estimate):
    rng = np.random.default_rng(5)
    reference = Moments(np.zeros(8), np.eye(8), 10**9)

    def distance(f):
        return frechet_unbiased(f, reference) if estimate == "unbiased" else frechet(moments(f), reference)

    draws = [rng.normal(size=(200, 8)) * 1.2 + 0.2 for _ in range(120)]
    real = np.std([distance(d) for d in draws], ddof=1)
    stated = np.sqrt(np.mean([jackknife(d, distance) ** 2 for d in draws[:40]]))
    assert 0.75 < stated / real < 1.4


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(6)
    same = [kernel_distance(rng.normal(size=(100, 4)), rng.normal(size=(300, 4)))[0] for _ in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(60)
    value, error = kernel_distance(rng.normal(size=(100, 4)) + 1, rng.normal(size=(300, 4)))
    assert value > 3 * error > 0


def test_precision_and_recall_tell_what_is_missing():
    rng = np.random.default_rng(7)
    both = np.concatenate([rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 50])
    one = rng.normal(size=(200, 2))
    precision, recall, _ = precision_recall(one, rng.permutation(both))
    assert precision > 0.9 and 0.3 < recall < 0.7
    precision, recall, _ = precision_recall(rng.permutation(both), one)
    assert 0.3 < precision < 0.7 and recall > 0.9


@pytest.mark.parametrize("block", [2**24, 700])
def test_precision_and_recall_are_their_definition_whatever_the_block(monkeypatch, block):
    """By all distances at once, as the definition has it; recall's error by leaving images out for real."""
    monkeypatch.setattr(distances, "_BLOCK", block)
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(120, 3)) * 0.8 + 5, rng.normal(size=(120, 3)) + 5

    def definition(x, y):
        radius_x, radius_y = (np.sort(cdist(s, s), axis=1)[:, 3] for s in (x, y))
        between = cdist(x, y)
        return (between <= radius_y).any(1).mean(), (between <= radius_x[:, None]).any(0).mean()

    precision, recall, error = precision_recall(x, y)
    assert (precision, recall) == definition(x, y)
    left = np.array([definition(x[np.arange(120) % 10 != g], y)[1] for g in range(10)])
    assert error == pytest.approx(np.sqrt(0.9 * np.sum((left - left.mean()) ** 2)))


def test_extrapolation_is_refused_where_it_takes_back_too_much():
    rng = np.random.default_rng(9)
    real = rng.normal(size=(400, 8))
    few, enough = (list(fid.distances("fd", rng.normal(size=(n, 8)), real, "x", "p", {})) for n in (63, 64))
    assert enough[0].metric.name == "fd_inf" and "fd_inf_refused" not in enough[-1].extra
    assert "fd_inf" not in [score.metric.name for score in few]
    assert few[-1].extra["fd_inf_refused"].startswith("FEW_IMAGES: 63 images for 8 features")


def test_one_image_is_no_distribution():
    with pytest.raises(ValueError, match="at least two"):
        moments(np.zeros((1, 4)))
