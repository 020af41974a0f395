"""The timestep shift, the segments and the Euler grid."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcflow_jax import schema
from arcflow_jax.errors import UserError
from arcflow_jax.flow.schedule import Scheduler, boundaries, euler_grid, sigma_of
from tests.helpers import golden

times = st.floats(0, 1, width=32)
shifts = st.floats(0.25, 8, width=32)


@settings(deadline=None)
@given(times, times, shifts)
def test_sigma_of_is_monotone_and_1_over_the_shift_inverts_it(t, other, shift):
    low, high = sorted([t, other])
    assert 0 <= sigma_of(low, shift) <= sigma_of(high, shift) <= 1
    assert sigma_of(sigma_of(t, shift), 1 / shift) == pytest.approx(t, abs=1e-6)


def test_sigma_of_keeps_the_ends_and_moves_the_middle():
    sigma = sigma_of(jnp.array([0.0, 0.5, 1.0]), 3.2)
    np.testing.assert_array_equal(sigma[jnp.array([0, 2])], [0.0, 1.0])
    assert sigma[1] == pytest.approx(16 / 21)
    np.testing.assert_array_equal(sigma_of(jnp.linspace(0, 1, 9), 1.0), jnp.linspace(0, 1, 9))


def test_sigma_of_equals_the_authors():
    case = golden.load("02_momentum_integration")
    sigma = sigma_of(case["inputs/raw_t_end"], 3.2)
    np.testing.assert_allclose(sigma, case["outputs/sigma_end_f64"], rtol=1e-14)


@settings(deadline=None)
@given(st.integers(1, 8), st.floats(0.1, 2))
def test_segments_are_equal_but_the_last(segments, ratio):
    bounds = np.asarray(boundaries(segments, ratio))
    lengths = -np.diff(bounds)
    assert bounds.shape == (segments + 1,)
    assert bounds[0] == 1
    assert bounds[-1] == 0
    np.testing.assert_allclose(lengths[:-1], lengths[:1].repeat(segments - 1), atol=1e-6)
    if segments > 1:
        assert lengths[-1] / lengths[0] == pytest.approx(ratio, rel=1e-4)


def test_euler_grid_is_the_scheduler_of_diffusers():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    steps, shift = 7, 3.2
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    np.testing.assert_allclose(euler_grid(steps, shift), scheduler.sigmas.numpy(), atol=1e-6)


def test_euler_grid_of_qwen_image_is_stretched():
    """With the settings of its scheduler_config.json and diffusers' pipeline, for 1024² pixels, 4096 tokens."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "use_dynamic_shifting": True}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config, shift_terminal=0.02)
    shift = Scheduler(**config).shift_for(4096)
    for steps in (2, 9):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=math.log(shift))
        np.testing.assert_allclose(euler_grid(steps, shift, 0.02), scheduler.sigmas.numpy(), atol=1e-6)
    np.testing.assert_array_equal(euler_grid(1, shift, 0.02), [1.0, 0.0])


def test_shift_is_an_argument_of_the_compiled_function():
    compiled = jax.jit(lambda shift: euler_grid(4, shift))
    for shift in (1.0, 3.2):
        np.testing.assert_allclose(compiled(shift), euler_grid(4, shift), rtol=1e-6)
    assert compiled._cache_size() == 1


def test_scheduler_shift_is_constant_or_grows_with_the_image():
    assert Scheduler(shift=3.0).shift_for(4096) == 3.0
    flux = Scheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)  # FLUX.1-dev's
    assert flux.shift_for(256) == pytest.approx(math.exp(0.5))
    assert flux.shift_for(4096) == pytest.approx(math.exp(1.15))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shift": 0}, r"shift is 0, but has to be a number from 0\.001 to 1000"),
        ({"shift_terminal": 1}, "shift_terminal is 1, but has to be a number at least 0 and below 1"),
        ({"base_image_seq_len": 4096}, "max_image_seq_len is 4096, but has to be above base_image_seq_len, 4096"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is True, only False is supported"),
        ({"use_karras_sigmas": 0}, "use_karras_sigmas is 0, only False is supported"),
    ],
)
def test_schedulers_that_are_refused(config, message):
    with pytest.raises(UserError, match=f"^here: {message}$"):
        schema.parse(Scheduler, config, "here")


def test_a_shift_that_overflows_is_refused():
    steep = Scheduler(use_dynamic_shifting=True, base_image_seq_len=1, max_image_seq_len=2, base_shift=0, max_shift=1)
    with pytest.raises(UserError, match=r"timestep shift is e\^4\.1e\+03 for an image of 4096 tokens"):
        steep.shift_for(4096)
