"""FLUX.1's transformer (diffusers' FluxTransformer2DModel) up to, not including, its output layer.

    tokens, σ, text, pooled text, guidance
      → L double blocks: text and image keep weights of their own and attend to each other
      → M single blocks: both in one sequence, attention and MLP in parallel
      → hidden image tokens and the time embedding

The output norm and projection are `head.OutputLayer`: the student retrains them. Attribute names are those of the
checkpoint.
"""

# B batch, N image tokens, T text tokens, S = T + N, D width, H heads, E head dim, L / M stacked blocks

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from arcflow_jax.networks.attention import attention
from arcflow_jax.networks.conditioning import interleave
from arcflow_jax.networks.layers import TEACHER, LayerNorm, Linear, Mode, RMSNorm, scan_blocks, stack
from arcflow_jax.parallel.mesh import constrain


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Geometry of a FLUX.1 transformer, under the names of its config.json."""

    in_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    REQUIRED: ClassVar[dict[str, Any]] = {"patch_size": 1, "out_channels": None}

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["text", "pooled", "guidance", "positions"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class FluxConditioning:
    """What a FLUX velocity depends on besides state and σ.

    Attributes:
      text: T5 hidden states, [B, T, joint_attention_dim].
      pooled: CLIP pooled state, [B, pooled_projection_dim].
      guidance: embedded guidance scale, [B]; None for a checkpoint without guidance embedding.
      positions: (0, row, column) of each image token, [N, 3], as `latents.position_ids` gives.
    """

    text: jax.Array
    pooled: jax.Array
    guidance: jax.Array | None
    positions: jax.Array

    @property
    def batch_size(self) -> int:
        return len(self.text)

    def repeat(self, times: int) -> FluxConditioning:
        """For a batch in which each example stands `times` times in a row."""
        if times == 1:
            return self
        text, pooled, guidance = jax.tree.map(
            lambda x: jnp.repeat(x, times, axis=0), (self.text, self.pooled, self.guidance)
        )
        return FluxConditioning(text, pooled, guidance, self.positions)

    def paired(self, negative: FluxConditioning) -> FluxConditioning:
        """For a batch in which each example is followed by itself under its negative; embedded guidance is 1."""
        text, pooled = interleave(self.text, negative.text), interleave(self.pooled, negative.pooled)
        guidance = None if self.guidance is None else jnp.ones(len(text), self.guidance.dtype)
        return FluxConditioning(text, pooled, guidance, self.positions)


def sinusoid(value: jax.Array, width: int) -> jax.Array:
    """Sinusoidal features of a σ or a guidance scale, [B] → [B, width], cosines first, in float32.

    FLUX feeds 1000 · value to the frequencies of Vaswani et al. 2017 (arXiv 1706.03762). Their exponents are rounded
    to float32, as in PyTorch: at angles of 1000 radians that rounding shows in the result.
    """
    half = width // 2
    exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angle = 1000.0 * value.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class EmbeddingMLP(nnx.Module):
    """linear_1, SiLU, linear_2: [B, d_in] → [B, D]."""

    def __init__(self, d_in: int, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.linear_1 = Linear(d_in, width, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mode: Mode = TEACHER) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x, mode)), mode)


class TimeTextEmbedding(nnx.Module):
    """The modulation vector: σ, guidance and pooled text, each through an MLP of its own, added."""

    FEATURES = 256

    def __init__(self, config: FluxConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.timestep_embedder = EmbeddingMLP(self.FEATURES, config.width, dtype=dtype, rngs=rngs)
        self.guidance_embedder = (
            EmbeddingMLP(self.FEATURES, config.width, dtype=dtype, rngs=rngs) if config.guidance_embeds else None
        )
        self.text_embedder = EmbeddingMLP(config.pooled_projection_dim, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, sigma: jax.Array, conditioning: FluxConditioning, dtype: Any, mode: Mode) -> jax.Array:
        y = self.timestep_embedder(sinusoid(sigma, self.FEATURES).astype(dtype), mode)
        y = y + self.text_embedder(conditioning.pooled.astype(dtype))
        if self.guidance_embedder is not None:
            y = y + self.guidance_embedder(sinusoid(conditioning.guidance, self.FEATURES).astype(dtype))
        return y  # [B, D]


def rotary(positions: jax.Array, axes_dims: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary angles, each [S, E/2] float32, of positions [S, axes] (arXiv 2104.09864)."""
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = 10_000.0 ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles.append(positions[:, axis, None].astype(jnp.float32) * frequencies.astype(np.float32))
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each neighbouring pair of features of x [B, S, H, E] by its angle, in float32."""
    cos, sin = (t[None, :, None, :] for t in rope)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


class Modulation(nnx.Module):
    """The shifts, scales and gates of a block, `count` vectors [B, 1, D] made from the time embedding."""

    def __init__(self, width: int, count: int, *, dtype: Any, rngs: nnx.Rngs):
        self.linear = Linear(width, count * width, dtype=dtype, rngs=rngs)
        self.count = count

    def __call__(self, temb: jax.Array) -> list[jax.Array]:
        y = self.linear(jax.nn.silu(temb))
        if not jax.sharding.get_abstract_mesh().empty:
            # Whole on every device of a mesh: split by features, it would split the tokens that it modulates likewise
            y = jax.lax.with_sharding_constraint(y, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))
        return jnp.split(y[:, None], self.count, axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer norm without weights of its own, then the block's scale and shift."""
    return LayerNorm(x.shape[-1], eps=1e-6, affine=False)(x) * (1 + scale) + shift


class FeedForward(nnx.Module):
    def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.proj_in = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(4 * width, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return self.proj_out(jax.nn.gelu(self.proj_in(x, mode), approximate=True), mode)


def qkv(
    x: jax.Array, to_q: Linear, to_k: Linear, to_v: Linear, norm_q: RMSNorm, norm_k: RMSNorm
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys (both RMS-normed a head) and values of tokens x [B, S, D], each [B, S, H, E]."""
    head_dim = norm_q.scale.shape[-1]
    # Behind the barrier, because XLA for TPUs would fold the heads into the products, and keep a copy of all the
    # stacked weights transposed for that: 2.6 GiB for FLUX.1-dev
    projected = jax.lax.optimization_barrier([linear(x) for linear in (to_q, to_k, to_v)])
    heads = (y.reshape(*x.shape[:-1], -1, head_dim) for y in projected)
    q, k, v = (constrain(y, "batch", None, "attending_heads", None) for y in heads)
    return norm_q(q), norm_k(k), v


def attended(out: jax.Array) -> jax.Array:  # [B, S, H, E] -> [B, S, D]
    """What tokens have gathered from one another, back where the tokens are."""
    return constrain(out.reshape(*out.shape[:2], -1), "batch", "tokens", "heads")


class JointAttention(nnx.Module):
    """Attention over text and image tokens together, each with projections of its own."""

    def __init__(self, config: FluxConfig, *, dtype: Any, rngs: nnx.Rngs):
        def project() -> Linear:
            return Linear(config.width, config.width, axes=("embed", "heads"), dtype=dtype, rngs=rngs)

        def output() -> Linear:
            return Linear(config.width, config.width, axes=("heads", "embed"), dtype=dtype, rngs=rngs)

        def norm() -> RMSNorm:
            return RMSNorm(config.attention_head_dim, eps=1e-6, dtype=dtype)

        self.to_q, self.to_k, self.to_v, self.to_out = project(), project(), project(), output()
        self.add_q_proj, self.add_k_proj, self.add_v_proj, self.to_add_out = project(), project(), project(), output()
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = norm(), norm(), norm(), norm()

    def __call__(self, text: jax.Array, image: jax.Array, rope: Any) -> tuple[jax.Array, jax.Array]:
        of_text = qkv(text, self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k)
        of_image = qkv(image, self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(of_text, of_image, strict=True))  # [B, S, H, E]
        out = attention(rotate(q, rope), rotate(k, rope), v)
        length = text.shape[1]
        return self.to_add_out(attended(out[:, :length])), self.to_out(attended(out[:, length:]))


class DoubleBlock(nnx.Module):
    """Text and image with weights of their own: joint attention, then an MLP each, both modulated and gated."""

    def __init__(self, config: FluxConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = Modulation(config.width, 6, dtype=dtype, rngs=rngs)
        self.norm1_context = Modulation(config.width, 6, dtype=dtype, rngs=rngs)
        self.attn = JointAttention(config, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(config.width, dtype=dtype, rngs=rngs)
        self.ff_context = FeedForward(config.width, dtype=dtype, rngs=rngs)

    def __call__(
        self, text: jax.Array, image: jax.Array, temb: jax.Array, rope: Any, mode: Mode
    ) -> tuple[jax.Array, jax.Array]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(temb)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = self.norm1_context(temb)

        text_update, image_update = self.attn(modulate(text, t_shift, t_scale), modulate(image, shift, scale), rope)
        image = image + gate * image_update
        text = text + t_gate * text_update

        image = image + mlp_gate * self.ff(modulate(image, mlp_shift, mlp_scale), mode)
        text = text + t_mlp_gate * self.ff_context(modulate(text, t_mlp_shift, t_mlp_scale), mode)
        return text, image


class SelfAttention(nnx.Module):
    def __init__(self, config: FluxConfig, *, dtype: Any, rngs: nnx.Rngs):
        def project() -> Linear:
            return Linear(config.width, config.width, axes=("embed", "heads"), dtype=dtype, rngs=rngs)

        self.to_q, self.to_k, self.to_v = project(), project(), project()
        self.norm_q = RMSNorm(config.attention_head_dim, eps=1e-6, dtype=dtype)
        self.norm_k = RMSNorm(config.attention_head_dim, eps=1e-6, dtype=dtype)

    def __call__(self, x: jax.Array, rope: Any) -> jax.Array:
        q, k, v = qkv(x, self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k)
        return attended(attention(rotate(q, rope), rotate(k, rope), v))


class SingleBlock(nnx.Module):
    """Text and image in one sequence: attention and MLP side by side, one gated output projection."""

    def __init__(self, config: FluxConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.norm = Modulation(width, 3, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.proj_mlp = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(5 * width, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array, rope: Any, mode: Mode) -> jax.Array:
        shift, scale, gate = self.norm(temb)
        y = modulate(x, shift, scale)
        mlp = jax.nn.gelu(self.proj_mlp(y, mode), approximate=True)
        return x + gate * self.proj_out(jnp.concatenate([self.attn(y, rope), mlp], axis=-1), mode)


class Flux(nnx.Module):
    """The backbone. Computes in `dtype`; weights are stored in `param_dtype`."""

    def __init__(self, config: FluxConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        options = {"dtype": param_dtype, "rngs": rngs}
        self.x_embedder = Linear(config.in_channels, config.width, axes=(None, "embed"), **options)
        self.context_embedder = Linear(config.joint_attention_dim, config.width, axes=(None, "embed"), **options)
        self.time_text_embed = TimeTextEmbedding(config, **options)
        self.transformer_blocks = stack(
            lambda rngs: DoubleBlock(config, dtype=param_dtype, rngs=rngs), config.num_layers, rngs
        )
        self.single_transformer_blocks = stack(
            lambda rngs: SingleBlock(config, dtype=param_dtype, rngs=rngs), config.num_single_layers, rngs
        )

    def __call__(
        self, tokens: jax.Array, sigma: jax.Array, conditioning: FluxConditioning, mode: Mode = TEACHER
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden image tokens [B, N, D] and the time embedding [B, D].

        Args:
          tokens: packed latents, [B, N, in_channels].
          sigma: noise level in [0, 1], [B].
          conditioning: see FluxConditioning.
          mode: teacher, or student with its adapters.
        """
        image = self.x_embedder(tokens.astype(self.dtype))
        text = self.context_embedder(conditioning.text.astype(self.dtype))
        temb = self.time_text_embed(sigma, conditioning, self.dtype, mode.fold(0))
        length = text.shape[1]
        text_positions = jnp.zeros((length, conditioning.positions.shape[1]), conditioning.positions.dtype)
        rope = rotary(jnp.concatenate([text_positions, conditioning.positions]), self.config.axes_dims_rope)

        def split(tokens: jax.Array) -> jax.Array:  # [B, .., D]
            return constrain(tokens, "batch", "tokens", None)

        def double(block: DoubleBlock, carry: Any, mode: Mode) -> Any:
            return jax.tree.map(split, block(*carry, temb, rope, mode))

        def single(block: SingleBlock, carry: Any, mode: Mode) -> Any:
            return split(block(carry, temb, rope, mode))

        text, image = scan_blocks(self.transformer_blocks, (split(text), split(image)), double, mode.fold(1))
        joined = split(jnp.concatenate([text, image], axis=1))  # [B, S, D]
        joined = scan_blocks(self.single_transformer_blocks, joined, single, mode.fold(2))
        return split(joined[:, length:]), temb
