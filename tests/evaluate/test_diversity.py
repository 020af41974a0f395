"""Diversity of a prompt's images, and retrieval, against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from arcflow_jax.evaluate.diversity import mean_pairwise_distance
from arcflow_jax.evaluate.retrieval import TIE, recall


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("images", [2, 3, 16])
def test_diversity_is_the_mean_over_all_pairs(images):
    features = np.random.default_rng(0).standard_normal((4, images, 12)).astype(np.float32) + 0.7
    for found, own in zip(mean_pairwise_distance(features), features.astype(np.float64), strict=True):
        distances = [1 - a @ b / np.sqrt(a @ a * (b @ b)) for a, b in itertools.combinations(own, 2)]
        assert found == pytest.approx(np.mean(distances), rel=1e-12)


def test_diversity_of_known_angles():
    opposite = np.array([[[1, 0], [-3, 0]]])
    right = np.array([[[1, 0, 0], [0, 2, 0], [0, 0, 0.1]]])
    assert mean_pairwise_distance(opposite) == pytest.approx([2])
    assert mean_pairwise_distance(right) == pytest.approx([1])
    assert mean_pairwise_distance(np.zeros((1, 4, 3))) == 0


def test_nearly_equal_images_have_a_small_diversity_and_not_rounding():
    rng = np.random.default_rng(1)
    direction = unit(rng.standard_normal((1, 1, 64)))
    sideways = rng.standard_normal((1, 16, 64))
    sideways -= (sideways @ direction[0, 0])[..., None] * direction
    found = [mean_pairwise_distance(direction + size * sideways)[0] for size in (1e-6, 1e-7)]
    assert found[0] / found[1] == pytest.approx(100, rel=1e-3)  # 1 − cosine grows with the square of the angle
    assert mean_pairwise_distance(direction.repeat(16, 1)) < 1e-30


def test_diversity_does_not_depend_on_how_many_images_there_are():
    """Its expectation, so that a reference may have fewer."""
    features = np.random.default_rng(2).standard_normal((4000, 12, 5)) + 1
    many, few = mean_pairwise_distance(features).mean(), mean_pairwise_distance(features[:, :3]).mean()
    assert few == pytest.approx(many, rel=0.02)


def test_recall_is_the_share_whose_prompt_is_near():
    rng = np.random.default_rng(3)
    prompts = unit(rng.standard_normal((40, 6)))
    own = rng.integers(0, 40, 100)
    images = unit(prompts[own] + 0.5 * rng.standard_normal((100, 6)))
    found = recall(images.astype(np.float32), prompts.astype(np.float32), own, (1, 5, 40))
    order = (-(images @ prompts.T)).argsort(1)
    for row, number, ranking in zip(found, own, order, strict=True):
        rank = ranking.tolist().index(number)
        assert row.tolist() == [rank < 1, rank < 5, True]
    assert 0.05 < found[:, 0].mean() < found[:, 1].mean() < 1


def test_equally_near_prompts_share():
    prompts = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, -1]], np.float32)
    images = np.array([[1, 0], [0, 1], unit(np.array([1, 0.1]))], np.float32)
    # One of three, nothing nearer; alone in front; of the three at the place 1, each in one of three orders
    assert recall(images, prompts, [0, 3, 2], (1, 2, 3)) == pytest.approx(
        np.array([[1 / 3, 2 / 3, 1], [1, 1, 1], [1 / 3, 2 / 3, 1]])
    )
    # Behind one that is nearer, a tie of two shares the second and the third place
    prompts = np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], np.float32)
    assert recall(np.array([[1, 0]]), prompts, [2], (1, 2, 3)) == pytest.approx(np.array([[0, 0.5, 1]]))


@pytest.mark.parametrize("noise", [0, TIE / 10])
def test_features_that_say_nothing_give_chance(noise):
    rng = np.random.default_rng(4)
    same = np.full((50, 8), 8**-0.5)
    varied = unit(rng.standard_normal((50, 8)))
    for images, prompts in [(same, same + noise * rng.standard_normal((50, 8))), (varied, same)]:
        assert recall(images, prompts, range(50)).mean(0) == pytest.approx([1 / 50, 5 / 50])
    # The same for all images, but different prompts: each place is taken once
    assert recall(same, varied, range(50)).mean(0) == pytest.approx([1 / 50, 5 / 50])
