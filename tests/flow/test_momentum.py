"""The momentum mixture: against quadrature, exact series and the authors' values, and its properties."""

# B batch, N tokens, K modes, C latent channels, 4 pixels of a token's patch

from __future__ import annotations

import dataclasses
from fractions import Fraction
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcflow_jax.flow import momentum
from arcflow_jax.flow.curve import Span
from arcflow_jax.flow.momentum import Mixture, head_sizes, initial_log_momenta, phi
from arcflow_jax.flow.schedule import sigma_of
from tests.helpers import golden


# A mixture does not depend on where its segment ends
@jax.jit
def velocity(mixture, src, sigma):
    return mixture.velocity(Span(src, jnp.nan), sigma)


@jax.jit
def mean_velocity(mixture, src, a, b):
    return mixture.mean_velocity(Span(src, jnp.nan), a, b)


@jax.jit
def displacement(mixture, src, a, b):
    return mixture.displacement(Span(src, jnp.nan), a, b)


SETS = ("normal", "zero", "tiny", "large", "mixed", "authors_init")  # the log-momenta of golden cases 01 and 02


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random_mixture(seed=0, *, batch=2, modes=4, scale=4.0, dtype=np.float64) -> Mixture:
    rng = np.random.default_rng(seed)
    tokens, channels = 3, 2
    return Mixture(
        means=jnp.asarray(rng.standard_normal((batch, tokens, modes, channels, 4)), dtype),
        logits=jnp.asarray(rng.standard_normal((batch, tokens, modes, 4)), dtype),
        log_momenta=jnp.asarray(rng.uniform(-scale, scale, (batch, tokens, modes - 1, 4)), dtype),
    )


def assert_close(actual, desired, rtol):
    """Relative to the largest value, because a sum over modes may cancel."""
    np.testing.assert_allclose(actual, desired, rtol=0, atol=rtol * np.abs(desired).max())


# φ


def exact_phi(z: float) -> tuple[float, float]:
    """φ and its derivative in rational arithmetic: Σ zⁿ/(n+1)! and Σ (n+1)·zⁿ/(n+2)!."""
    z, term, value, slope = Fraction(z), Fraction(1), Fraction(0), Fraction(0)
    for n in range(100):  # |z| ≤ 20: what follows is below 1e-25
        value += term
        slope += term * (n + 1) / (n + 2)
        term = term * z / (n + 2)
    return float(value), float(slope)


phi_and_gradient = jax.jit(jax.vmap(jax.value_and_grad(phi)))
NEAR_ZERO = [0.0, 1e-30, 1e-12, 1e-8, 1e-5, 1e-4, 1e-3, 0.1, 0.4999, 0.5, 0.5001, 1.0, 3.0, 20.0]


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-6), (np.float64, 4e-15)])
def test_phi_and_its_gradient_are_exact(x64, dtype, rtol):
    z = np.array([sign * value for value in NEAR_ZERO for sign in (1, -1)]).astype(dtype)
    value, slope = np.array([exact_phi(float(v)) for v in z]).T
    ours, our_slope = phi_and_gradient(jnp.asarray(z))
    np.testing.assert_allclose(ours, value, rtol=rtol)
    np.testing.assert_allclose(our_slope, slope, rtol=rtol)


def test_phi_is_finite_wherever_float32_can_hold_it():
    z = jnp.array([-1e30, -200.0, 80.0])
    value, slope = phi_and_gradient(z)
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()


# Displacement is the integral of the velocity


def quadrature(mixture, src, a, b):
    """∫ v dσ from b to a with 30 Gauss–Legendre points, for scalar noise levels."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    sigmas = (a + b) / 2 + (a - b) / 2 * nodes
    return (a - b) / 2 * sum(w * velocity(mixture, src, s) for w, s in zip(weights, sigmas, strict=True))


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-3, 4.0])
@pytest.mark.parametrize(("src", "a", "b"), [(1.0, 1.0, 0.762), (1.0, 0.9, 0.0), (0.762, 0.5, 0.49)])
def test_displacement_is_the_integral_of_velocity(x64, scale, src, a, b):
    mixture = random_mixture(scale=scale)
    assert_close(displacement(mixture, src, a, b), quadrature(mixture, src, a, b), 1e-14)


def test_gradient_at_zero_momentum(x64):
    """d/dg of π·m·e^{g·p}·Δ·φ(g·Δ) at g = 0 is π·m·Δ·(p + Δ/2), with p = σ_src − σ_a and Δ = σ_a − σ_b."""
    src, a, b = 1.0, 0.8, 0.3
    mixture = random_mixture(scale=0.0)
    gradient = jax.grad(lambda m: displacement(m, src, a, b).sum())(mixture)
    weights = jax.nn.softmax(mixture.logits, 2)
    expected = (weights * mixture.means.sum(3))[:, :, 1:] * (a - b) * ((src - a) + (a - b) / 2)
    assert_close(gradient.log_momenta, expected, 1e-14)


levels = st.floats(0, 1)
seeds = st.integers(0, 2**16)
scales = st.sampled_from([0.0, 1e-6, 1.0, 8.0])
properties = settings(deadline=None, max_examples=30)


@properties
@given(seeds, scales, levels, levels, levels, levels)
def test_displacement_is_additive_and_antisymmetric(seed, scale, src, a, b, c):
    with jax.enable_x64(True):
        mixture = random_mixture(seed, scale=scale)
        there = displacement(mixture, src, a, b)
        size = float(jnp.abs(mixture.means).max()) * np.exp(scale)
        np.testing.assert_allclose(
            there + displacement(mixture, src, b, c), displacement(mixture, src, a, c), atol=1e-13 * size
        )
        np.testing.assert_allclose(displacement(mixture, src, b, a), -there, atol=1e-13 * size)


@properties
@given(seeds, scales, levels, levels, levels)
def test_velocity_is_the_derivative_of_displacement(seed, scale, src, a, b):
    with jax.enable_x64(True):
        mixture = random_mixture(seed, scale=scale)
        _, slope = jax.jvp(lambda b: displacement(mixture, src, a, b), (b,), (1.0,))
        np.testing.assert_allclose(slope, -velocity(mixture, src, b), atol=1e-12 * np.exp(scale))
        np.testing.assert_allclose(
            mean_velocity(mixture, src, a, a), velocity(mixture, src, a), atol=1e-13 * np.exp(scale)
        )


@properties
@given(seeds, scales, levels, levels, levels)
def test_equivalent_parameters_give_the_same_displacement(seed, scale, src, a, b):
    """Modes in any order, logits plus a constant at each pixel, a mode split into two modes of half its weight."""
    with jax.enable_x64(True):
        mixture = random_mixture(seed, scale=scale)
        expected = displacement(mixture, src, a, b)
        order = np.array([2, 0, 1])
        reordered = Mixture(
            mixture.means[:, :, [0, *(1 + order)]],
            mixture.logits[:, :, [0, *(1 + order)]] + mixture.means[:, :, :1, 0],
            mixture.log_momenta[:, :, order],
        )
        divided = Mixture(
            jnp.concatenate([mixture.means, mixture.means[:, :, -1:]], 2),
            jnp.concatenate([mixture.logits, mixture.logits[:, :, -1:]], 2).at[:, :, -2:].add(-np.log(2)),
            jnp.concatenate([mixture.log_momenta, mixture.log_momenta[:, :, -1:]], 2),
        )
        for other in (reordered, divided):
            np.testing.assert_allclose(displacement(other, src, a, b), expected, atol=1e-12 * np.exp(scale))


def test_noise_levels_are_per_example_or_for_the_whole_batch():
    mixture = random_mixture(dtype=np.float32)
    src, a, b = np.float32([[1.0, 0.76], [0.9, 0.5], [0.3, 0.1]])
    whole = displacement(mixture, src, a, b), velocity(mixture, src, a)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], mixture)
        np.testing.assert_array_equal(displacement(one, src[i], a[i], b[i])[0], whole[0][i])
        np.testing.assert_array_equal(velocity(one, src[i], a[i])[0], whole[1][i])


def test_one_mode_is_a_constant_velocity():
    mixture = random_mixture(modes=1, dtype=np.float32)
    constant = mixture.means[:, :, 0].reshape(2, 3, -1)
    for sigma in (1.0, 0.5, 0.0):
        np.testing.assert_array_equal(velocity(mixture, 1.0, sigma), constant)
    np.testing.assert_allclose(displacement(mixture, 1.0, 0.75, 0.25), 0.5 * constant, rtol=1e-6)
    gradient = jax.grad(lambda m: displacement(m, 1.0, 0.75, 0.25).sum())(mixture)
    assert gradient.log_momenta.shape == (2, 3, 0, 4)
    np.testing.assert_allclose(gradient.means, np.full(mixture.means.shape, 0.5), rtol=1e-6)


def test_arithmetic_is_float32_for_a_half_precision_mixture():
    mixture = random_mixture(dtype=jnp.bfloat16)
    upcast = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), mixture)
    result = displacement(mixture, 1.0, 0.9, 0.2)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, displacement(upcast, 1.0, 0.9, 0.2))


def test_no_copy_of_the_modes_is_made():
    mixture = jax.eval_shape(lambda: random_mixture(dtype=np.float32))
    mixture = dataclasses.replace(mixture, means=jax.ShapeDtypeStruct((2, 3, 4, 4096, 4), jnp.float32))
    memory = displacement.lower(mixture, 1.0, 0.9, 0.2).compile().memory_analysis()
    assert memory.temp_size_in_bytes < mixture.means.size * 4


# Mode dropout


def test_dropped_modes_leave_the_mixture():
    mixture = random_mixture(modes=3, dtype=np.float32)
    uniforms = jnp.array([[0.9, 0.05, 0.5], [0.0, 0.01, 0.099]])
    result = velocity(mixture.drop_modes(uniforms, 0.1), 1.0, 0.3)
    without = Mixture(
        mixture.means[:, :, jnp.array([0, 2])], mixture.logits[:, :, jnp.array([0, 2])], mixture.log_momenta[:, :, 1:]
    )
    np.testing.assert_allclose(result[0], velocity(without, 1.0, 0.3)[0], rtol=1e-5)  # without the second mode
    np.testing.assert_array_equal(result[1], velocity(mixture, 1.0, 0.3)[1])  # all would be dropped, so none is


def test_nothing_is_dropped_at_rate_zero():
    mixture = random_mixture(dtype=np.float32)
    np.testing.assert_array_equal(mixture.drop_modes(jnp.zeros((2, 4)), 0.0).logits, mixture.logits)


# Head sizes and initial values


def test_head_has_the_published_size():
    """FLUX.1: K = 16 modes of 16 channels on a width of 3072; kernels and biases."""
    sizes = head_sizes(16, 16)
    assert [3073 * size for size in sizes] == [3_146_752, 196_672, 184_380]
    assert head_sizes(1, 16) == (64, 4, 0)


def test_initial_momenta_are_the_authors():
    theirs = golden.load("06a_flux_student_init")["outputs/proj_out_loggamma.bias"].reshape(3, 4)  # K = 4
    np.testing.assert_allclose(np.broadcast_to(initial_log_momenta(4, (0.2, 4.0))[:, None], (3, 4)), theirs, rtol=2e-6)
    momenta = np.exp(initial_log_momenta(16, (0.2, 4.0)))
    assert momenta.shape == (15,)
    assert momenta[[0, -1]] == pytest.approx([0.2, 4.0])
    np.testing.assert_allclose(momenta[1:] / momenta[:-1], 20 ** (1 / 14), rtol=1e-5)
    assert initial_log_momenta(1, (0.2, 4.0)).shape == (0,)


# The authors' values


def golden_mixture(momenta: str) -> Mixture:
    case = golden.load("01_policy_velocity")
    return golden.mixture(case["inputs/means"], case["inputs/logits"], case[f"inputs/loggammas_{momenta}"])


def as_float64(mixture: Mixture) -> Mixture:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), mixture)


def assert_gradients_equal_golden(gradient, case, momenta, rtol=2e-6):
    theirs = golden.mixture(*(case[f"grads/{momenta}_{name}"] for name in ("means", "logweights", "loggammas")))
    jax.tree.map(lambda ours, theirs: assert_close(ours, theirs, rtol), gradient, theirs)


@pytest.mark.parametrize("momenta", SETS)
def test_velocity_equals_golden(momenta):
    case, mixture = golden.load("01_policy_velocity"), golden_mixture(momenta)
    for src, sigma, theirs in zip(
        case["inputs/sigma_src"], case["inputs/sigma"], case[f"outputs/v_{momenta}"], strict=True
    ):
        assert_close(velocity(mixture, src, sigma), golden.tokens(theirs), 2e-6)


@pytest.mark.parametrize("momenta", ["normal", "mixed"])
def test_velocity_equals_golden_in_float64_and_in_its_gradient(x64, momenta):
    case, mixture = golden.load("01_policy_velocity"), golden_mixture(momenta)
    levels = list(zip(case["inputs/sigma_src"], case["inputs/sigma"], strict=True))
    for (src, sigma), theirs in zip(levels, case[f"outputs/v_{momenta}_f64"], strict=True):
        assert_close(velocity(as_float64(mixture), src, sigma), golden.tokens(theirs), 1e-12)
    cotangent = golden.tokens(case["inputs/cotangent"])
    gradient = jax.grad(lambda m: (velocity(m, *levels[-2]) * cotangent).sum())(mixture)
    assert_gradients_equal_golden(gradient, case, momenta)


@jax.jit
def authors_displacement(mixture, src, a, b):
    """Displacement with the authors' φ in the place of ours."""
    with mock.patch.object(momentum, "phi", golden.authors_phi):
        return mixture.displacement(Span(src, jnp.nan), a, b)


def golden_steps():
    """The segments of case 02: x, [(σ_src, σ_a, σ_b)]."""
    case = golden.load("02_momentum_integration")
    ends = sigma_of(case["inputs/raw_t_end"], 3.2)
    x = golden.tokens(golden.load("01_policy_velocity")["inputs/x_t_src"])
    return case, x, list(zip(case["inputs/sigma_src"], case["inputs/sigma_start"], ends, strict=True))


@pytest.mark.parametrize("momenta", SETS)
def test_displacement_is_within_the_authors_clamp(momenta):
    """They replace a |z| below 1e-4 by 1e-4. φ' is about ½ there, so each mode is off by at most half of 1e-4."""
    case, x, steps = golden_steps()
    mixture = golden_mixture(momenta)
    for (src, a, b), theirs in zip(steps, case[f"outputs/x_end_{momenta}"], strict=True):
        absolute = dataclasses.replace(mixture, means=jnp.abs(mixture.means))
        slack = 0.5001 * golden.CLAMP * np.abs(displacement(absolute, src, a, b)) + 2e-6 * np.abs(theirs).max()
        assert (np.abs(x - displacement(mixture, src, a, b) - golden.tokens(theirs)) <= slack).all()


@pytest.mark.parametrize("momenta", SETS)
def test_displacement_equals_golden_with_the_authors_phi(momenta):
    case, x, steps = golden_steps()
    mixture = golden_mixture(momenta)
    for (src, a, b), theirs in zip(steps, case[f"outputs/x_end_{momenta}"], strict=True):
        assert_close(x - authors_displacement(mixture, src, a, b), golden.tokens(theirs), 2e-6)


@pytest.mark.parametrize("momenta", ["normal", "mixed"])
def test_displacement_equals_golden_in_float64_with_the_authors_phi(x64, momenta):
    case, x, steps = golden_steps()
    mixture = as_float64(golden_mixture(momenta))
    for (src, a, b), theirs in zip(steps, case[f"outputs/x_end_{momenta}_f64"], strict=True):
        assert_close(x - authors_displacement(mixture, src, a, b), golden.tokens(theirs), 1e-12)


# The gradient of the authors' quotient loses digits like 1/z: few in "normal", more in "mixed", where some z are just
# above the clamp, and none in "tiny", where all z are clamped.
@pytest.mark.parametrize(("momenta", "rtol"), [("normal", 2e-5), ("tiny", 2e-6), ("mixed", 1e-4)])
def test_gradient_equals_golden_with_the_authors_phi(momenta, rtol):
    case, _, steps = golden_steps()
    cotangent = golden.tokens(golden.load("01_policy_velocity")["inputs/cotangent"])
    gradient = jax.grad(lambda m: -(authors_displacement(m, *steps[3]) * cotangent).sum())(golden_mixture(momenta))
    assert_gradients_equal_golden(gradient, case, momenta, rtol)
