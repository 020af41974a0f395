"""The samplers, on flows with known trajectories."""

# B batch, N tokens, D features of a token, K modes

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.flow.momentum import Mixture
from arcflow_jax.flow.sampler import Known, euler, noised, sample
from arcflow_jax.flow.schedule import euler_grid, euler_level

B, N, D = 2, 3, 8
NOISE = np.random.default_rng(0).standard_normal((B, N, D)).astype(np.float32)


# Gaussian data N(MEAN, SPREAD²). Its flow is x = (1−σ)·mean + √((1−σ)²·spread² + σ²)·ε, where ε is the noise at σ = 1

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


# x' = rate·x, one rate per example: a student with the single log-momentum g = −rate solves it exactly

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


def test_linear_student_is_exact_for_a_single_point():
    """All trajectories to a single point are straight: x − σ·v is that point at any σ."""
    datum = np.linspace(-2, 2, D, dtype=np.float32)

    def student(x, sigma):
        v = (x - datum) / sigma[:, None, None]
        return Mixture(v.reshape(B, N, 1, D // 4, 4), jnp.zeros((B, N, 1, 4)), jnp.zeros((B, N, 0, 4)))

    for steps in (1, 2):
        result = sample(student, NOISE, steps=steps, shift=3.2, final_step_ratio=1.0)
        np.testing.assert_allclose(result, np.broadcast_to(datum, NOISE.shape), atol=1e-6)


def test_networks_are_evaluated_where_segments_start():
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


@pytest.mark.parametrize(
    ("sampler", "network", "options"),
    [(sample, exponential_student, {"final_step_ratio": 1.0}), (euler, gaussian_teacher, {})],
)
def test_compiled_once_with_one_copy_of_the_network(sampler, network, options):
    chex.clear_trace_counter()
    network = chex.assert_max_traces(network, n=2)  # scan may trace its body twice, for any number of steps

    @jax.jit
    @chex.assert_max_traces(n=1)  # neither the latents nor the shift are compiled in
    def run(x, shift):
        return sampler(network, x, steps=9, shift=shift, **options)

    first, second = run(NOISE, 1.0), run(2 * NOISE, 3.2)
    assert np.abs(first - second).max() > 0.1


def test_networks_that_return_another_shape_are_refused():
    """[.., N, 1] would broadcast against the latents without an error."""
    with pytest.raises(AssertionError, match="shape"):
        euler(lambda x, sigma: x[..., :1], NOISE, steps=2, shift=1.0)
    with pytest.raises(AssertionError, match="shape"):
        sample(lambda x, sigma: first_token(exponential_student(x, sigma)), NOISE, steps=2, shift=1, final_step_ratio=1)
    with pytest.raises(AssertionError, match="rank"):
        euler(gaussian_teacher, NOISE[0], steps=2, shift=1.0)


def first_token(mixture: Mixture) -> Mixture:
    return jax.tree.map(lambda x: x[:, :1], mixture)


def test_latents_are_float32_for_bfloat16_networks():
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


# Starts below σ = 1. Two segments with shift 3.2 and a last one half as long meet at σ = 8/13

MIDDLE = 8 / 13


@pytest.mark.parametrize(
    ("start", "evaluated"),
    [(1.0, [1.0, MIDDLE]), (0.7, [0.7, MIDDLE]), (MIDDLE, [MIDDLE]), (0.3, [0.3]), (1e-6, [1e-6])],
)
def test_the_student_starts_in_the_segment_of_its_noise_level(start, evaluated):
    seen = []

    def student(x, sigma):
        jax.debug.callback(lambda s: seen.append(s.tolist()), sigma, ordered=True)
        return exponential_student(x, sigma)

    times = {"steps": 2, "shift": 3.2, "final_step_ratio": 0.5}
    result = jax.block_until_ready(sample(student, NOISE, **times, start=jnp.float32(start)))
    jax.effects_barrier()
    np.testing.assert_allclose(seen, np.repeat([[level] for level in evaluated], B, axis=1), rtol=1e-6)
    np.testing.assert_allclose(result, NOISE * np.exp(-RATES * start), rtol=2e-6)


@pytest.mark.parametrize("terminal", [None, 0.02])
def test_the_teacher_takes_the_steps_of_its_grid_that_are_left(terminal):
    steps, shift = 10, 2.0
    grid = euler_grid(steps, shift, terminal)
    for strength in np.linspace(0.1, 1, 10):
        left = grid[round(10 - 10 * strength) :]
        start = euler_level(jnp.float32(strength), steps, shift, terminal)
        np.testing.assert_allclose(start, left[0], rtol=1e-6)
        result = euler(lambda x, sigma: RATES * x, NOISE, steps=steps, shift=shift, terminal=terminal, start=start)
        factors = 1 + RATES[..., None] * np.diff(left)
        np.testing.assert_allclose(result, NOISE * factors.prod(-1), rtol=2e-6)
    levels = euler_level(jnp.linspace(0, 1, 200), steps, shift, terminal)
    assert (np.diff(levels) > 0).all()  # also between the levels of the grid


def test_what_is_known_has_its_noise_at_every_level():
    clean = np.full_like(NOISE, 0.4)
    repaint = np.zeros(NOISE.shape, bool)
    repaint[:, 1] = True
    seen = []

    def student(x, sigma):
        jax.debug.callback(lambda *both: seen.append(both), x, sigma, ordered=True)
        return exponential_student(x, sigma)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(start):
        known = Known(clean, NOISE, repaint)
        return sample(
            student, noised(clean, NOISE, start), steps=4, shift=1.0, final_step_ratio=1, start=start, known=known
        )

    for start, calls in ((0.9, 4), (0.6, 3)):
        seen.clear()
        result = np.asarray(run(start))
        jax.effects_barrier()
        assert len(seen) == calls
        for x, sigma in seen:
            np.testing.assert_allclose(x[~repaint], ((1 - sigma[0]) * clean + sigma[0] * NOISE)[~repaint], atol=1e-6)
        np.testing.assert_array_equal(result[~repaint], clean[~repaint])
        alone = noised(clean, NOISE, start) * np.exp(-RATES * start)
        np.testing.assert_allclose(result[repaint], alone[repaint], rtol=2e-6)
