"""GPUs without bfloat16: what is computed in float16, and what exceeds its range."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax.generate import default_dtype
from arcflow_jax.networks.float16 import saturated
from arcflow_jax.networks.text.t5 import T5Config, T5Encoder


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("gpu", "7.0", jnp.float16),  # V100
        ("gpu", "7.5", jnp.float16),  # T4
        ("gpu", "8.0", jnp.bfloat16),
        ("gpu", "12.0", jnp.bfloat16),
        ("gpu", "gfx90a", jnp.bfloat16),  # MI250X
        ("tpu", None, jnp.bfloat16),
        ("cpu", None, jnp.float32),
    ],
)
def test_the_device_decides_the_precision(monkeypatch, platform, capability, dtype):
    device = types.SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert default_dtype() is dtype


def test_t5_does_not_overflow_in_float16():
    """Weights as large as T5-XXL's make tokens that exceed float16, and the result is that of float32."""
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    network = T5Encoder(config, rngs=nnx.Rngs(0))
    network.blocks.ff.wo.kernel[...] *= 60_000
    graphdef, state = nnx.split(network)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), state)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)  # the same weights
    ids = jnp.arange(4)[None]
    run = jax.jit(lambda weights: nnx.merge(graphdef, weights)(ids))
    ours, expected = run(half), run(rounded)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_only_float16_is_cut_to_its_range():
    large = np.array([1e6, -np.inf, 7], np.float32)
    assert saturated(jnp.asarray(large, jnp.float16)).tolist() == [65504, -65504, 7]
    assert saturated(jnp.asarray(large)).tolist() == large.tolist()
