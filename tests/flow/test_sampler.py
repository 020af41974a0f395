"""The samplers, on flows whose trajectories are known."""

# B batch, N tokens, D features of a token, K modes

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.flow.momentum import Mixture
from arcflow_jax.flow.sampler import euler, sample
from arcflow_jax.flow.schedule import euler_grid

B, N, D = 2, 3, 8
NOISE = np.random.default_rng(0).standard_normal((B, N, D)).astype(np.float32)


# Data of one Gaussian, N(MEAN, SPREAD²): along the flow x = (1−σ)·mean + √((1−σ)²·spread² + σ²)·ε, ε the noise at σ = 1

MEAN, SPREAD = 0.8, 0.5


def gaussian_teacher(x, sigma):
    sigma = sigma[:, None, None]
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * SPREAD**2) / variance * (x - (1 - sigma) * MEAN)


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_euler_converges_to_the_exact_trajectory_at_first_order(shift):
    def error(steps):
        return np.abs(euler(gaussian_teacher, NOISE, steps=steps, shift=shift) - (MEAN + SPREAD * NOISE)).max()

    errors = np.array([error(steps) for steps in (50, 100, 200)])
    assert errors[0] < 0.1
    np.testing.assert_allclose(errors[:-1] / errors[1:], 2, rtol=0.1)


# x' = rate·x with a rate for each example: a student with the one momentum g = −rate knows it in closed form

RATES = jnp.array([0.7, -1.9])[:, None, None]


def exponential_student(x, sigma):
    means = jnp.stack([jnp.zeros_like(x), RATES * x], 2).reshape(B, N, 2, D // 4, 4)
    logits = jnp.tile(jnp.array([-jnp.inf, 0.0])[:, None], (B, N, 1, 4))
    return Mixture(means, logits, jnp.broadcast_to(-RATES[..., None], (B, N, 1, 4)))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("shift", "ratio"), [(1.0, 1.0), (3.2, 1.0), (3.2, 0.3)])
def test_sampling_is_exact_in_any_number_of_steps(steps, shift, ratio):
    result = sample(exponential_student, NOISE, steps=steps, shift=shift, final_step_ratio=ratio)
    np.testing.assert_allclose(result, NOISE * np.exp(-RATES), rtol=2e-6)


def test_euler_takes_the_steps_of_its_grid():
    steps, shift = 5, 3.2
    result = euler(lambda x, sigma: RATES * x, NOISE, steps=steps, shift=shift)
    factors = 1 + RATES[..., None] * np.diff(euler_grid(steps, shift))
    np.testing.assert_allclose(result, NOISE * factors.prod(-1), rtol=2e-6)


def test_linear_student_of_a_single_point_arrives_in_one_step():
    """All trajectories to one datum are straight: x − σ·v is the datum from any σ."""
    datum = np.linspace(-2, 2, D, dtype=np.float32)

    def student(x, sigma):
        v = (x - datum) / sigma[:, None, None]
        return Mixture(v.reshape(B, N, 1, D // 4, 4), jnp.zeros((B, N, 1, 4)), jnp.zeros((B, N, 0, 4)))

    for steps in (1, 2):
        result = sample(student, NOISE, steps=steps, shift=3.2, final_step_ratio=1.0)
        np.testing.assert_allclose(result, np.broadcast_to(datum, NOISE.shape), atol=1e-6)


def test_networks_are_called_where_the_segments_begin():
    def levels(sampler, **kwargs):
        seen = []

        def network(x, sigma):
            jax.debug.callback(lambda s: seen.append(s.tolist()), sigma, ordered=True)
            return exponential_student(x, sigma) if sampler is sample else x

        jax.block_until_ready(sampler(network, NOISE, shift=3.2, **kwargs))
        jax.effects_barrier()
        return np.array(seen)

    np.testing.assert_allclose(
        levels(sample, steps=2, final_step_ratio=0.5), np.repeat([[1.0], [8 / 13]], B, axis=1), rtol=1e-6
    )
    np.testing.assert_allclose(levels(euler, steps=4), euler_grid(4, 3.2)[:4, None].repeat(B, 1), rtol=1e-6)


def test_one_network_in_the_program_however_many_steps():
    for sampler, network in ((sample, exponential_student), (euler, gaussian_teacher)):
        traced = []

        def counted(x, sigma, network=network, traced=traced):
            traced.append(x.shape)
            return network(x, sigma)

        kwargs = {"final_step_ratio": 1.0} if sampler is sample else {}
        run = jax.jit(
            lambda x, shift, sampler=sampler, kwargs=kwargs: sampler(counted, x, steps=9, shift=shift, **kwargs)
        )
        first = run(NOISE, 1.0)
        second = run(2 * NOISE, 3.2)
        assert len(traced) <= 2  # scan may look at its body twice
        assert run._cache_size() == 1  # neither latents nor shift are baked in
        assert np.abs(first - second).max() > 0.1


def test_networks_see_and_give_float32():
    def half(x, sigma):
        assert x.dtype == sigma.dtype == jnp.float32
        mixture = exponential_student(x, sigma)
        return dataclasses.replace(mixture, means=mixture.means.astype(jnp.bfloat16))

    latents = jnp.asarray(NOISE, jnp.bfloat16)
    result = sample(half, latents, steps=2, shift=3.2, final_step_ratio=1.0)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, latents.astype(jnp.float32) * np.exp(-RATES), rtol=2e-2)
    assert euler(
        lambda x, sigma: half(x, sigma).means[:, :, 1].reshape(x.shape), latents, steps=2, shift=1.0
    ).dtype == (jnp.float32)
