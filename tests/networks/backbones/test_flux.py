"""FLUX.1's transformer against diffusers' and against the authors' values, through the converter's table."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from arcflow_jax.convert.backbones import flux as table
from arcflow_jax.errors import UserError
from arcflow_jax.networks.backbones.flux import Flux, FluxConfig
from arcflow_jax.networks.student import ArcModel
from tests.helpers.twins import (
    FLUX,
    flux_inputs,
    flux_twin_output,
    imported,
    randomize,
    relative_error,
    transformer_scale,
    velocity,
)

CONFIGS = {
    "guidance": FLUX,
    "no guidance, one block each": dataclasses.replace(
        FLUX, guidance_embeds=False, num_layers=1, num_single_layers=1, in_channels=16
    ),
    "three heads of 16": dataclasses.replace(
        FLUX, attention_head_dim=16, num_attention_heads=3, axes_dims_rope=(4, 6, 6), num_single_layers=2
    ),
}


def new_teacher(config: FluxConfig, dtype=jnp.float32) -> ArcModel:
    rngs = nnx.Rngs(0)
    return ArcModel(Flux(config, dtype=dtype, rngs=rngs), param_dtype=jnp.float32, rngs=rngs)


@pytest.mark.parametrize("name", CONFIGS)
def test_teacher_is_diffusers_transformer(name):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name]
    twin = diffusers.FluxTransformer2DModel(**dataclasses.asdict(config))
    randomize(twin, transformer_scale, lambda name: 0.02)
    tokens, sigma, c = flux_inputs(config)
    theirs = flux_twin_output(twin, tokens, sigma, c)
    with jax.default_matmul_precision("highest"):
        ours = velocity(imported(table, twin, lambda: new_teacher(config)), tokens, sigma, c)
    assert relative_error(ours, theirs) < 1e-5
    rounded = velocity(imported(table, twin, lambda: new_teacher(config, jnp.bfloat16)), tokens, sigma, c)
    assert rounded.dtype == jnp.float32
    assert relative_error(rounded, theirs) < 0.03


def test_rotary_axes_must_add_up_to_the_head():
    with pytest.raises(UserError, match=r"axes_dims_rope \(8, 12, 8\) adds up to 28, but .* attention_head_dim, 32"):
        dataclasses.replace(FLUX, axes_dims_rope=(8, 12, 8))
