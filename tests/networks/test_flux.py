"""FLUX.1's transformer against diffusers' and against the authors' values, through the converter's table."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax.convert import flux as table
from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.families.latents import position_ids
from arcflow_jax.networks.flux import Flux, FluxConditioning, FluxConfig
from arcflow_jax.networks.student import ArcModel

TINY = FluxConfig(
    in_channels=64,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=48,
    pooled_projection_dim=24,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)
GEOMETRIES = {
    "guidance": TINY,
    "no guidance, one block each": dataclasses.replace(
        TINY, guidance_embeds=False, num_layers=1, num_single_layers=1, in_channels=16
    ),
    "three heads of 16": dataclasses.replace(
        TINY, attention_head_dim=16, num_attention_heads=3, axes_dims_rope=(4, 6, 6), num_single_layers=2
    ),
}


def teacher(config: FluxConfig, tensors, dtype=jnp.float32) -> ArcModel:
    """The teacher with a checkpoint's weights."""

    def make() -> ArcModel:
        rngs = nnx.Rngs(0)
        return ArcModel(Flux(config, dtype=dtype, rngs=rngs), param_dtype=jnp.float32, rngs=rngs)

    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, import_tensors(table, tensors, abstract))


def inputs(config: FluxConfig, rows: int = 4, columns: int = 6, length: int = 7):
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((2, rows * columns, config.in_channels)).astype(np.float32)
    sigma = np.array([0.9, 0.31], np.float32)
    conditioning = FluxConditioning(
        text=rng.standard_normal((2, length, config.joint_attention_dim)).astype(np.float32),
        pooled=rng.standard_normal((2, config.pooled_projection_dim)).astype(np.float32),
        guidance=np.array([3.5, 1.0], np.float32) if config.guidance_embeds else None,
        positions=position_ids(rows, columns),
    )
    return tokens, sigma, conditioning


def relative_error(ours, theirs) -> float:
    """The largest error over the largest value."""
    theirs = np.asarray(theirs, np.float64)
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def twin_output(twin, tokens, sigma, c: FluxConditioning) -> np.ndarray:
    """What a FluxTransformer2DModel of diffusers, or one derived from it, makes of our inputs."""
    import torch

    def as_torch(x):
        return None if x is None else torch.from_numpy(np.array(x))

    with torch.no_grad():
        return twin(
            hidden_states=as_torch(tokens),
            timestep=as_torch(sigma),
            encoder_hidden_states=as_torch(c.text),
            pooled_projections=as_torch(c.pooled),
            guidance=as_torch(c.guidance),
            img_ids=as_torch(c.positions),
            txt_ids=torch.zeros(c.text.shape[1], 3),
        ).sample.numpy()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_teacher_is_diffusers_transformer(geometry):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = GEOMETRIES[geometry]
    torch.manual_seed(0)
    twin = diffusers.FluxTransformer2DModel(**dataclasses.asdict(config)).eval()
    with torch.no_grad():
        for parameter in twin.parameters():  # norms and biases too, so that nothing is tested at its default
            parameter.copy_(torch.randn_like(parameter) * 0.3 / max(1, parameter[0].numel()) ** 0.5 + 0.02)
    tokens, sigma, c = inputs(config)
    theirs = twin_output(twin, tokens, sigma, c)
    tensors = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    with jax.default_matmul_precision("highest"):
        ours = teacher(config, tensors).teacher_velocity(tokens, sigma, c)
    assert relative_error(ours, theirs) < 1e-5
    rounded = teacher(config, tensors, jnp.bfloat16).teacher_velocity(tokens, sigma, c)
    assert rounded.dtype == jnp.float32
    assert relative_error(rounded, theirs) < 0.03
