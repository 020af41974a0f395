"""FLUX.1's transformer (diffusers' FluxTransformer2DModel) up to, not including, its output layer.

    tokens, σ, text, pooled text, guidance
      → L double blocks: text and image have their own weights and attend to each other
      → M single blocks: text and image in one sequence, attention and MLP in parallel
      → hidden image tokens and the time embedding

The output norm and projection are in `head.OutputLayer`, because the student retrains them. Attribute names are those
of the checkpoint.
"""

# B batch, N image tokens, R tokens of a reference image, T text tokens, S = T + N + R
# D width, H heads, E head dim, L / M stacked blocks

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.networks.attention import attention
from arcflow_jax.networks.conditioning import References, beside_references, interleave, repeated
from arcflow_jax.networks.float16 import saturated
from arcflow_jax.networks.layers import TEACHER, Linear, Mode, RMSNorm, scan_blocks, stack
from arcflow_jax.networks.transformer import (
    EmbeddingMLP,
    FeedForward,
    JointProjections,
    Modulation,
    Rope,
    check_rope,
    concatenate_heads,
    head_projection,
    join_heads,
    modulate,
    qkv,
    rotary,
    rotate,
    sinusoid,
)
from arcflow_jax.parallel.mesh import constrain
from arcflow_jax.schema import Layers, Width, Widths


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """The model config of a FLUX.1 transformer, with the names of its config.json."""

    in_channels: Width
    num_layers: Layers
    num_single_layers: Layers
    attention_head_dim: Width
    num_attention_heads: Width
    joint_attention_dim: Width
    pooled_projection_dim: Width
    guidance_embeds: bool
    axes_dims_rope: Widths = (16, 56, 56)

    REQUIRED: ClassVar[dict[str, Any]] = {"patch_size": 1, "out_channels": None}

    def __post_init__(self) -> None:
        check_rope(self.axes_dims_rope, self.attention_head_dim)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FluxConditioning:
    """What a FLUX velocity depends on besides the state and σ; see `conditioning.Conditioning`.

    Attributes:
      text: T5 hidden states, [B, T, joint_attention_dim].
      pooled: CLIP pooled state, [B, pooled_projection_dim].
      guidance: embedded guidance scale, [B]; None for a checkpoint without guidance embedding.
      positions: (0, row, column) of each image token, [N, 3], as `latents.position_ids` gives.
      references: the reference image of FLUX.1-Kontext, if there is one.
    """

    text: jax.Array
    pooled: jax.Array
    guidance: jax.Array | None
    positions: jax.Array
    references: References | None = None

    @property
    def batch_size(self) -> int:
        return len(self.text)

    def repeat(self, times: int) -> FluxConditioning:
        """Each example `times` times in a row."""
        if times == 1:
            return self
        text, pooled, guidance = jax.tree.map(
            lambda x: jnp.repeat(x, times, axis=0), (self.text, self.pooled, self.guidance)
        )
        return FluxConditioning(text, pooled, guidance, self.positions, repeated(self.references, times))

    def paired(self, negative: FluxConditioning) -> FluxConditioning:
        """Each example followed by its negative prompt's conditioning, with the same references.

        Embedded guidance is 1.
        """
        text, pooled = interleave(self.text, negative.text), interleave(self.pooled, negative.pooled)
        guidance = None if self.guidance is None else jnp.ones(len(text), self.guidance.dtype)
        return FluxConditioning(text, pooled, guidance, self.positions, repeated(self.references, 2))


class TimeTextEmbedding(nnx.Module):
    """The modulation vector: the sum of σ, guidance and pooled text, each through its own MLP."""

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


class JointAttention(JointProjections):
    """Attention over text and image tokens together, text first."""

    def __call__(self, text: jax.Array, image: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array]:
        q, k, v = concatenate_heads(self.text_heads(text), self.image_heads(image))  # [B, S, H, E]
        out = attention(rotate(q, rope), rotate(k, rope), v)
        length = text.shape[1]
        return self.outputs(out[:, :length], out[:, length:])


class DoubleBlock(nnx.Module):
    """Text and image have their own weights: joint attention, then an MLP each, both modulated and gated."""

    def __init__(self, config: FluxConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = Modulation(config.width, 6, dtype=dtype, rngs=rngs)
        self.norm1_context = Modulation(config.width, 6, dtype=dtype, rngs=rngs)
        self.attn = JointAttention(config.width, config.attention_head_dim, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(config.width, dtype=dtype, rngs=rngs)
        self.ff_context = FeedForward(config.width, dtype=dtype, rngs=rngs)

    def __call__(
        self, text: jax.Array, image: jax.Array, temb: jax.Array, rope: Rope, mode: Mode
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
    """Attention over one sequence, without an output projection."""

    def __init__(self, config: FluxConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.to_q, self.to_k, self.to_v = (head_projection(config.width, dtype=dtype, rngs=rngs) for _ in range(3))
        self.norm_q = RMSNorm(config.attention_head_dim, eps=1e-6, dtype=dtype)
        self.norm_k = RMSNorm(config.attention_head_dim, eps=1e-6, dtype=dtype)

    def __call__(self, x: jax.Array, rope: Rope) -> jax.Array:
        q, k, v = qkv(x, self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k)
        return join_heads(attention(rotate(q, rope), rotate(k, rope), v))


class SingleBlock(nnx.Module):
    """Text and image in one sequence: attention and MLP in parallel, and one gated output projection."""

    def __init__(self, config: FluxConfig, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.norm = Modulation(width, 3, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.proj_mlp = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(5 * width, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array, rope: Rope, mode: Mode) -> jax.Array:
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
        count = tokens.shape[1]
        tokens, positions = beside_references(tokens, conditioning.positions, conditioning.references)
        image = self.x_embedder(tokens.astype(self.dtype))
        text = self.context_embedder(conditioning.text.astype(self.dtype))
        temb = self.time_text_embed(sigma, conditioning, self.dtype, mode.fold(0))
        length = text.shape[1]
        text_positions = jnp.zeros((length, positions.shape[1]), positions.dtype)
        rope = rotary(jnp.concatenate([text_positions, positions]), self.config.axes_dims_rope)

        def shard(tokens: jax.Array) -> jax.Array:  # [B, .., D]
            return constrain(saturated(tokens), "batch", "tokens", None)

        def double(block: DoubleBlock, carry: Any, mode: Mode) -> Any:
            return jax.tree.map(shard, block(*carry, temb, rope, mode))

        def single(block: SingleBlock, carry: Any, mode: Mode) -> Any:
            return shard(block(carry, temb, rope, mode))

        text, image = scan_blocks(self.transformer_blocks, (shard(text), shard(image)), double, mode.fold(1))
        joined = shard(jnp.concatenate([text, image], axis=1))  # [B, S, D]
        joined = scan_blocks(self.single_transformer_blocks, joined, single, mode.fold(2))
        return shard(joined[:, length : length + count]), temb
