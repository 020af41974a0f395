"""Moments gathered in batches, and the Fréchet distance, against numpy, scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.frechet import Moments, frechet_distance


def normal(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    """The moments of a distribution, not of a sample."""
    return Moments(2, np.asarray(mean, np.float64), np.asarray(covariance, np.float64))


@pytest.mark.parametrize("sizes", [(7,), (1, 5, 1), (3, 32, 2, 100)])
def test_moments_of_batches_add_up_to_those_of_the_whole(sizes):
    rng = np.random.default_rng(0)
    # Far from zero, where sums of squares would lose all digits of the covariance
    features = rng.standard_normal((sum(sizes), 6)) @ rng.standard_normal((6, 6)) + 1e8
    pieces = [Moments.from_features(piece) for piece in np.split(features, np.cumsum(sizes)[:-1])]
    together = sum(pieces[1:], start=pieces[0])
    assert together.count == len(features)
    np.testing.assert_allclose(together.mean, features.mean(0), rtol=1e-15)
    np.testing.assert_allclose(together.covariance, np.cov(features, rowvar=False), atol=1e-6)


def test_float32_features_are_summed_in_float64():
    features = (np.arange(200).reshape(-1, 1) % 2 + 30_000).astype(np.float32)
    together = sum(
        (Moments.from_features(piece) for piece in np.split(features, 50)), start=Moments.from_features(features[:2])
    )
    assert together.mean[0] == 30_000.5
    assert together.covariance[0, 0] == pytest.approx(0.25 * 202 / 201)


def test_distance_matches_the_definition():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((300, 20)) @ rng.standard_normal((20, 20)) + 1
    b = rng.standard_normal((200, 20)) @ rng.standard_normal((20, 20))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    a, b = Moments.from_features(a), Moments.from_features(b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_closed_forms():
    one = np.eye(5)
    assert frechet_distance(normal(np.zeros(5), one), normal(np.full(5, 2.0), one)) == pytest.approx(4 * 5)
    # (μ₁ − μ₂)² + (σ₁ − σ₂)² in one dimension, and in each of those that are independent
    assert frechet_distance(normal([1], [[9]]), normal([3], [[16]])) == pytest.approx(4 + 1)
    deviations = np.array([0.0, 0.5, 1, 2, 30]), np.array([0.0, 0.0, 3, 2, 1])
    distance = frechet_distance(*(normal(np.zeros(5), np.diag(each**2)) for each in deviations))
    assert distance == pytest.approx(0.25 + 4 + 29**2)
    # A turned ellipse, 3 by 1, against itself turned back: tr(Σ₁Σ₂)^½ = √(tr Σ₁Σ₂ + 2 √det Σ₁Σ₂) in two dimensions
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    turned = turn @ np.diag([9, 1]) @ turn.T
    cross = np.sqrt(np.trace(turned @ np.diag([9, 1])) + 2 * 9)
    assert frechet_distance(normal([0, 0], turned), normal([0, 0], np.diag([9, 1]))) == pytest.approx(20 - 2 * cross)


def test_fewer_images_than_features():
    """tr(Σa Σb)^½ is the nuclear norm of A Bᵀ for centred features A and B, even if Σ is singular."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((40, 300)) + 0.1, 2 * rng.standard_normal((60, 300))
    norm = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T, compute_uv=False).sum() / np.sqrt(39 * 59)
    trace = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + trace - 2 * norm
    assert frechet_distance(Moments.from_features(a), Moments.from_features(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(Moments.from_features(a), Moments.from_features(a)) == pytest.approx(0, abs=1e-3)


def test_sets_that_cannot_be_compared():
    two = Moments.from_features(np.eye(3))
    with pytest.raises(UserError, match="a covariance needs at least 2 images, but there is 1"):
        frechet_distance(two, Moments.from_features(np.ones((1, 3))))
    with pytest.raises(UserError, match="cannot compare 3 features with 4"):
        frechet_distance(two, Moments.from_features(np.eye(4)))
