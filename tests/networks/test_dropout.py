"""The random bits of dropout are uniform, and differ between keys, rows and columns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from arcflow_jax.networks.dropout import dropout, random_bits

SHAPE = (4, 64, 512)


def bits(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.asarray(random_bits(jax.random.key(seed), shape))


def test_every_bit_is_a_fair_coin():
    """At most one of 32 bits may be further from one half than in one of a thousand trials."""
    drawn = bits(0).ravel()
    ones = np.array([((drawn >> i) & 1).sum() for i in range(32)])
    deviations = np.abs(ones - drawn.size / 2) / np.sqrt(drawn.size / 4)
    assert (deviations > 3.3).sum() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_uniform_and_neighbours_independent(seed):
    """χ² of the top bytes, and of pairs of their halves next to each other along every axis."""
    top = bits(seed) >> 24
    joint = [16 * (first >> 4) + (second >> 4) for first, second in ((top[:-1], top[1:]), (top[:, :-1], top[:, 1:]))]
    joint.append(16 * (top[..., :-1] >> 4) + (top[..., 1:] >> 4))
    joint.append(16 * (top >> 4) + (bits(seed + 1) >> 28))  # the next key, at the same place
    for values in (top, *joint):
        counts = np.bincount(values.ravel(), minlength=256)
        assert np.square(counts - counts.mean()).sum() / counts.mean() < chi2.ppf(1 - 1e-4, 255)


def test_no_two_rows_share_their_numbers():
    drawn = bits(3, (8, 2048, 16)).reshape(-1, 16)
    assert len(np.unique(np.sort(drawn, -1), axis=0)) == len(drawn)
    assert len(np.unique(bits(3, (65, 3, 7)))) == 65 * 3 * 7  # of 2³², so few do not meet by chance


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_rate_and_mean(rate):
    x = jnp.ones(SHAPE, jnp.float32)
    out = np.asarray(dropout(jax.random.key(1), rate, x))
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    assert abs((out == 0).mean() - rate) < 4 * deviation
    np.testing.assert_allclose(out[out != 0], 1 / (1 - rate), rtol=1e-6)
    again = jax.jit(dropout, static_argnums=1)(jax.random.key(1), rate, x)
    np.testing.assert_array_equal(out == 0, np.asarray(again) == 0)
