"""The Legendre series: against numpy's polynomials and quadrature, its properties, and the head that predicts it."""

# B batch, N tokens, K coefficients, C latent channels, 4 pixels of a token's patch

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from arcflow_jax.errors import UserError
from arcflow_jax.flow.curve import Span
from arcflow_jax.flow.legendre import Series, polynomials
from arcflow_jax.networks.head import LegendreHead, OutputLayer
from arcflow_jax.networks.layers import Base

SPAN = Span(0.9, 0.25)
levels = st.floats(0, 1)
properties = settings(deadline=None, max_examples=30)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random_series(seed=0, *, terms=5, dtype=np.float64) -> Series:
    return Series(jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3, terms, 2, 4)), dtype))


def numpys(series: Series, span: Span, sigma: float, integrate: int = 0) -> np.ndarray:
    """v(σ), or its antiderivative by σ, with numpy.polynomial."""
    c = np.moveaxis(np.asarray(series.coefficients), 2, 0)  # [K, B, N, C, 4]
    if integrate:
        c = np.polynomial.legendre.legint(c, integrate) * (span.src - span.end) / -2  # dσ = −(src − end)/2 · ds
    s = 2 * (span.src - sigma) / (span.src - span.end) - 1
    return np.polynomial.legendre.legval(s, c).reshape(2, 3, 8)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("a", "b"), [(0.9, 0.25), (0.7, 0.69), (0.5, 0.5), (0.3, 0.8)])
def test_velocity_and_displacement_equal_numpys(x64, terms, a, b):
    series = random_series(terms=terms)
    np.testing.assert_allclose(series.velocity(SPAN, a), numpys(series, SPAN, a), atol=1e-13)
    expected = numpys(series, SPAN, a, 1) - numpys(series, SPAN, b, 1)
    np.testing.assert_allclose(series.displacement(SPAN, a, b), expected, atol=1e-13)


@properties
@given(st.integers(0, 2**16), levels, levels, levels)
def test_displacements_add_up_and_velocity_is_their_derivative(seed, a, b, c):
    with jax.enable_x64(True):
        series = random_series(seed)
        there, on, whole = (series.displacement(SPAN, *pair) for pair in ((a, b), (b, c), (a, c)))
        size = float(jnp.abs(jnp.stack([there, on, whole])).max()) + 1
        np.testing.assert_allclose(there + on, whole, atol=1e-12 * size)
        _, slope = jax.jvp(lambda b: series.displacement(SPAN, a, b), (b,), (1.0,))
        np.testing.assert_allclose(slope, -series.velocity(SPAN, b), atol=1e-10 * size)
        np.testing.assert_allclose(series.mean_velocity(SPAN, a, a), series.velocity(SPAN, a), atol=1e-12 * size)


def test_whole_segment_is_the_first_coefficient(x64):
    series = random_series()
    mean = series.mean_velocity(SPAN, *SPAN)
    np.testing.assert_allclose(mean, series.coefficients[:, :, 0].reshape(2, 3, 8), atol=1e-14)


def test_polynomials_are_orthogonal(x64):
    nodes, weights = np.polynomial.legendre.leggauss(8)
    values = polynomials(jnp.asarray(nodes)[:, None], 6)  # [8, 6]
    np.testing.assert_allclose(values.T * weights @ values, np.diag(2 / (2 * np.arange(6) + 1)), atol=1e-14)


def test_noise_levels_are_per_example_or_for_the_whole_batch():
    series = random_series(dtype=np.float32)
    src, end, a, b = np.float32([[1.0, 0.76], [0.5, 0.0], [0.9, 0.5], [0.6, 0.1]])
    whole = series.displacement(Span(src, end), a, b)
    for i in range(2):
        one = Series(series.coefficients[i : i + 1])
        np.testing.assert_allclose(one.displacement(Span(src[i], end[i]), a[i], b[i])[0], whole[i], atol=1e-6)


def test_arithmetic_is_float32_for_half_precision_coefficients():
    series = random_series(dtype=jnp.bfloat16)
    upcast = Series(series.coefficients.astype(jnp.float32))
    result = series.displacement(SPAN, 0.9, 0.3)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, upcast.displacement(SPAN, 0.9, 0.3))


def test_mode_dropout_is_refused():
    with pytest.raises(UserError, match="a Series has no modes to drop: set mode_dropout to 0"):
        random_series(dtype=np.float32).drop_modes(jnp.zeros((2, 5)), 0.1)


def test_student_starts_as_its_teacher():
    teacher = OutputLayer(16, 8, rngs=nnx.Rngs(0))
    for variable in jax.tree.leaves(nnx.state(teacher, Base), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        variable[...] = jax.random.normal(jax.random.key(1), variable.shape)
    head = LegendreHead(16, 8, 3, rngs=nnx.Rngs(2))
    head.initialize_from(teacher, jnp.zeros((3, 2)))
    hidden, temb = jax.random.normal(jax.random.key(3), (2, 5, 16)), jax.random.normal(jax.random.key(4), (2, 16))
    series, expected = head(hidden, temb), teacher(hidden, temb)
    for sigma in (0.9, 0.5, 0.25):
        np.testing.assert_allclose(series.velocity(SPAN, sigma), expected, atol=1e-5)
