"""Tiny networks, inputs for them, the outputs of their twins in diffusers, and how far apart results may be."""

# B batch, N image tokens, T text tokens

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.families.latents import centred_positions, position_ids
from arcflow_jax.networks import layers
from arcflow_jax.networks.backbones.flux import FluxConditioning, FluxConfig
from arcflow_jax.networks.backbones.flux2 import Flux2Conditioning, Flux2Config
from arcflow_jax.networks.backbones.qwen_image import QwenImageConditioning, QwenImageConfig
from arcflow_jax.networks.states import flatten, unflatten
from arcflow_jax.networks.student import ArcModel

FLUX = FluxConfig(
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
QWEN_IMAGE = QwenImageConfig(
    in_channels=64,
    num_layers=3,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=48,
    axes_dims_rope=(8, 12, 12),
)

FLUX2 = Flux2Config(
    in_channels=64,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=32,
    num_attention_heads=3,  # and as many groups
    joint_attention_dim=48,
    guidance_embeds=False,
    axes_dims_rope=(8, 8, 8, 8),
)


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest error divided by the largest value, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def rms_error(ours: Any, exact: Any) -> float:
    """The root mean square of the error divided by that of the values, in float64."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    return float(np.sqrt(np.square(ours - exact).mean() / np.square(exact).mean()))


def rounding_bounds(roundings: int) -> tuple[float, float]:
    """Between which the RMS error of a computation in bfloat16 has to be, for so many roundings in a row.

    bfloat16 has 8 significant bits: a rounding changes a value by at most 2^-9 of it, and by 2^-9/√3 of it in the root
    mean square. Independent errors add up in squares. Above, a factor of 3 allows for errors that are not independent
    and for layers that amplify them. Below, a single rounding, at the end, is half of that: less is not bfloat16.
    """
    one = 2**-9 / 3**0.5
    return one / 2, 3 * one * roundings**0.5


def randomize(model: Any, scale: Any, centre: Any = lambda name: 0.0) -> Any:
    """Draws every parameter of a torch module anew, so that none is left at a trivial value.

    Args:
      scale, centre: the standard deviation and the mean by (name, parameter) and by name.
    """
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(centre(name) + scale(name, parameter) * torch.randn_like(parameter))
    return model.eval()


def language_scale(name: str, parameter: Any) -> float:
    """Standard deviations for `randomize` of a language model."""
    return 0.3 if parameter.ndim == 1 or "embed" in name else parameter.shape[1] ** -0.5


def norm_centre(name: str) -> float:
    """Means for `randomize`: 1 for the scales of norms."""
    return 1.0 if "norm" in name else 0.0


def vae_scale(name: str, parameter: Any) -> float:
    """Standard deviations for `randomize` of a VAE."""
    return 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5


def scale_centre(name: str) -> float:
    """Means for `randomize`: 1 for the scales of norms that have biases."""
    return 1.0 if "norm" in name and name.endswith("weight") else 0.0


def flux_inputs(config: FluxConfig, rows: int = 4, columns: int = 6, length: int = 7):
    """Tokens, σ and conditioning for a batch of two."""
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


def flux_twin_output(twin: Any, tokens: Any, sigma: Any, c: FluxConditioning) -> np.ndarray:
    """The output of diffusers' FluxTransformer2DModel, or of a class derived from it, for our inputs."""
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


def qwen_inputs(config: QwenImageConfig, rows: int, columns: int, lengths: tuple[int, ...]):
    """Tokens, σ and conditioning. The padding of the text is not zero, so that reading it would show."""
    rng = np.random.default_rng(0)
    b, n = len(lengths), rows * columns
    tokens = rng.standard_normal((b, n, config.in_channels)).astype(np.float32)
    sigma = np.linspace(0.9, 0.31, b, dtype=np.float32)
    conditioning = QwenImageConditioning(
        text=10 * rng.standard_normal((b, max(lengths), config.joint_attention_dim)).astype(np.float32),
        lengths=np.array(lengths, np.int32),
        positions=centred_positions(rows, columns),
    )
    return tokens, sigma, conditioning


def qwen_twin(config: QwenImageConfig) -> Any:
    """diffusers' model with the same model config and random weights."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    channels = config.in_channels // 4
    twin = diffusers.QwenImageTransformer2DModel(**dataclasses.asdict(config), out_channels=channels)
    return randomize(twin, transformer_scale, lambda name: 0.02)


def transformer_scale(name: str, parameter: Any) -> float:
    return 0.3 / max(1, parameter[0].numel()) ** 0.5


def qwen_twin_velocity(twin: Any, tokens, sigma, c: QwenImageConditioning, rows: int, columns: int) -> np.ndarray:
    """The output of diffusers' QwenImageTransformer2DModel for our inputs."""
    import torch

    mask = np.arange(c.text.shape[1]) < np.asarray(c.lengths)[:, None]
    with torch.no_grad():
        return twin(
            hidden_states=torch.from_numpy(tokens),
            timestep=torch.from_numpy(sigma),
            encoder_hidden_states=torch.from_numpy(c.text),
            encoder_hidden_states_mask=torch.from_numpy(mask),
            img_shapes=[[(1, rows, columns)]] * len(tokens),
        ).sample.numpy()


def flux2_inputs(config: Flux2Config, rows: int, columns: int, length: int):
    """Tokens, σ and conditioning for a batch of two."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((2, rows * columns, config.in_channels)).astype(np.float32)
    conditioning = Flux2Conditioning(
        text=10 * rng.standard_normal((2, length, config.joint_attention_dim)).astype(np.float32),
        guidance=np.array([3.5, 1.0], np.float32) if config.guidance_embeds else None,
        positions=jnp.pad(position_ids(rows, columns), ((0, 0), (0, 1))),
    )
    return tokens, np.array([0.9, 0.31], np.float32), conditioning


def flux2_twin(config: Flux2Config) -> Any:
    """diffusers' model with the same model config and random weights."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    twin = diffusers.Flux2Transformer2DModel(**dataclasses.asdict(config))
    return randomize(twin, transformer_scale, lambda name: 0.02)


def flux2_twin_velocity(twin: Any, tokens: Any, sigma: Any, c: Flux2Conditioning) -> np.ndarray:
    """The output of diffusers' Flux2Transformer2DModel for our inputs."""
    import torch

    index = torch.arange(c.text.shape[1])
    with torch.no_grad():
        return twin(
            hidden_states=torch.from_numpy(np.array(tokens)),
            timestep=torch.from_numpy(sigma),
            encoder_hidden_states=torch.from_numpy(np.array(c.text)),
            guidance=None if c.guidance is None else torch.from_numpy(np.array(c.guidance)),
            img_ids=torch.from_numpy(np.array(c.positions)),
            txt_ids=torch.stack([0 * index, 0 * index, 0 * index, index], -1),
        ).sample.numpy()


def random_network(make: Callable[[], nnx.Module], scale: Callable[[str], float] = lambda path: 1.0) -> nnx.Module:
    """The network that `make` returns, with random weights that keep activations near 1.

    Kernels are N(0, 1/fan_in), norms N(1, 0.3²), biases and embeddings N(0, 0.3²); times `scale` of their path.
    """
    graphdef, state = nnx.split(layers.abstract(make))
    rng = np.random.default_rng(0)
    arrays = {}
    for path, variable in flatten(state).items():
        draw = rng.standard_normal(variable.shape)
        std = variable.shape[-2] ** -0.5 if path.endswith("kernel") else 0.3
        arrays[path] = jnp.asarray(scale(path) * (path.endswith("scale") + std * draw), variable.dtype)
    return nnx.merge(graphdef, unflatten(state, arrays))


def imported(table: Any, twin: Any, network: Callable[[], nnx.Module], dtype: Any = jnp.float32) -> nnx.Module:
    """The network that `network` makes, with the weights of its twin in PyTorch."""
    graphdef, state = nnx.split(layers.abstract(network))
    tensors = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    return nnx.merge(graphdef, import_tensors(table, tensors, state, dtype))


# Outside jit, every operation of a network would be compiled on its own


@nnx.jit
def run(network: nnx.Module, inputs: Any) -> Any:
    return network(inputs)


@nnx.jit
def velocity(model: ArcModel, tokens: Any, sigma: Any, conditioning: Any) -> jax.Array:
    return model.teacher_velocity(tokens, sigma, conditioning)


def bfloat16_error(network: nnx.Module, inputs: jax.Array) -> float:
    """The RMS error of a network in bfloat16 against itself in float32, with the same weights.

    The weights are rounded to bfloat16 for both, so that this is the error of the arithmetic alone.
    """
    graphdef, state = nnx.split(network)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    upcast = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    run = jax.jit(lambda weights: nnx.merge(graphdef, weights)(inputs))
    low, exact = run(rounded), run(upcast)
    chex.assert_equal_shape([low, exact])
    chex.assert_type([low, exact], [jnp.bfloat16, jnp.float32])
    return rms_error(low, exact)
