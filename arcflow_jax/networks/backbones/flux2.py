"""FLUX.2's transformer (diffusers' Flux2Transformer2DModel) up to, not including, its output layer.

    tokens, σ, text, reference images, guidance
      → shifts, scales and gates, the same for all blocks of a kind
      → L double blocks: text and image have their own weights and attend to each other
      → M single blocks: text and image in one sequence, attention and MLP in parallel
      → hidden image tokens and the time embedding

No linear layer has a bias, and every MLP is gated (SwiGLU). [klein] has no guidance embedding, FLUX.2-dev has one. Text
is padded to a static length, and its padding is attended, as in training. The output norm and projection are in
`head.OutputLayer`, because the student retrains them. Attribute names are those of the checkpoint.

One matrix of the checkpoint computes several parts of D features each: query, key, value, thrice gate and thrice value
of the MLP. Here its features are grouped: the first 128 of each part (a head), the next 128 of each, and so on. So a
device that has some of the features has the same ones of each part, and none has to be moved where parts meet. The
features that a layer reads are grouped in the same way. `convert.rules.grouped` does that to the checkpoint's weights.
"""

# B batch, N image tokens, R tokens of reference images, T text tokens, S = T + N + R
# D width, H heads, E head dim, L / M stacked blocks
# G groups, P parts, c features of a part in a group: D = G · c

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.networks.attention import attention
from arcflow_jax.networks.backbones.flux import JointAttention
from arcflow_jax.networks.conditioning import References, beside_references, interleave, repeated
from arcflow_jax.networks.float16 import saturated
from arcflow_jax.networks.layers import TEACHER, Linear, Mode, RMSNorm, scan_blocks, stack
from arcflow_jax.networks.transformer import (
    EmbeddingMLP,
    Modulation,
    Rope,
    check_rope,
    join_heads,
    modulate,
    rotary,
    rotate,
    sinusoid,
    split_heads,
)
from arcflow_jax.parallel.mesh import constrain
from arcflow_jax.schema import Layers, Theta, Width, Widths

FEATURES = 256  # of σ and of a guidance scale
GROUP = 128  # c, or what of it divides a width that it does not divide
MLP = 3  # hidden features of an MLP, as a multiple of D


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """The model config of a FLUX.2 transformer, with the names of its config.json."""

    in_channels: Width
    num_layers: Layers
    num_single_layers: Layers
    attention_head_dim: Width
    num_attention_heads: Width
    joint_attention_dim: Width
    guidance_embeds: bool = True  # diffusers' default, which FLUX.2-dev's config.json leaves out
    axes_dims_rope: Widths = (32, 32, 32, 32)
    rope_theta: Theta = 2000.0

    REQUIRED: ClassVar[dict[str, Any]] = {
        "patch_size": 1,
        "out_channels": None,
        "eps": 1e-6,
        "timestep_guidance_channels": FEATURES,
        "mlp_ratio": float(MLP),
    }

    def __post_init__(self) -> None:
        check_rope(self.axes_dims_rope, self.attention_head_dim)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flux2Conditioning:
    """What a FLUX.2 velocity depends on besides the state and σ; see `conditioning.Conditioning`.

    Attributes:
      text: hidden states of the text encoder, those of its padding as well, [B, T, joint_attention_dim].
      guidance: embedded guidance scale, [B]; None for a checkpoint without guidance embedding.
      positions: (0, row, column, 0) of each image token, [N, 4].
      references: reference images, if there are any.
    """

    text: jax.Array
    guidance: jax.Array | None
    positions: jax.Array
    references: References | None = None

    @property
    def batch_size(self) -> int:
        return len(self.text)

    def repeat(self, times: int) -> Flux2Conditioning:
        """Each example `times` times in a row."""
        if times == 1:
            return self
        text, guidance = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), (self.text, self.guidance))
        return Flux2Conditioning(text, guidance, self.positions, repeated(self.references, times))

    def paired(self, negative: Flux2Conditioning) -> Flux2Conditioning:
        """Each example followed by its negative prompt's conditioning, with the same references.

        Embedded guidance is 1.
        """
        text = interleave(self.text, negative.text)
        guidance = None if self.guidance is None else jnp.ones(len(text), self.guidance.dtype)
        return Flux2Conditioning(text, guidance, self.positions, repeated(self.references, 2))


class TimeGuidanceEmbedding(nnx.Module):
    """The modulation vector: the sum of σ and guidance, each through its own MLP."""

    def __init__(self, config: Flux2Config, *, dtype: Any, rngs: nnx.Rngs):
        def embedder() -> EmbeddingMLP:
            return EmbeddingMLP(FEATURES, config.width, bias=False, dtype=dtype, rngs=rngs)

        self.timestep_embedder = embedder()
        self.guidance_embedder = embedder() if config.guidance_embeds else None

    def __call__(self, sigma: jax.Array, guidance: jax.Array | None, dtype: Any, mode: Mode) -> jax.Array:
        y = self.timestep_embedder(sinusoid(sigma, FEATURES).astype(dtype), mode)
        if self.guidance_embedder is not None:
            y = y + self.guidance_embedder(sinusoid(guidance, FEATURES).astype(dtype))
        return y  # [B, D]


def in_groups(x: jax.Array, parts: int) -> jax.Array:  # [B, S, P · D] -> [B, S, G, P, c]
    """The grouped features that a layer has computed, with a dimension for the parts."""
    x = jax.lax.optimization_barrier(x)  # for the reason that `split_heads` tells
    return x.reshape(*x.shape[:2], -1, parts, math.gcd(x.shape[2] // parts, GROUP))


def gated(x: jax.Array) -> jax.Array:  # [B, S, G, 2 P, c] -> [B, S, G, P, c]
    """SwiGLU (arXiv 2002.05202): the second half of the parts, gated by the first."""
    gate, value = jnp.split(x, 2, axis=3)
    return jax.nn.silu(gate) * value


class GatedFeedForward(nnx.Module):
    """The MLP of a double block; one layer computes gate and value."""

    def __init__(self, config: Flux2Config, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.linear_in = Linear(width, 2 * MLP * width, bias=False, dtype=dtype, rngs=rngs)
        self.linear_out = Linear(MLP * width, width, bias=False, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        hidden = gated(in_groups(self.linear_in(x, mode), 2 * MLP))
        return self.linear_out(hidden.reshape(*x.shape[:2], -1), mode)


class DoubleBlock(nnx.Module):
    """Text and image have their own weights: joint attention, then an MLP each, both modulated and gated."""

    def __init__(self, config: Flux2Config, *, dtype: Any, rngs: nnx.Rngs):
        self.attn = JointAttention(config.width, config.attention_head_dim, bias=False, dtype=dtype, rngs=rngs)
        self.ff = GatedFeedForward(config, dtype=dtype, rngs=rngs)
        self.ff_context = GatedFeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        text: jax.Array,
        image: jax.Array,
        text_modulation: list[jax.Array],
        image_modulation: list[jax.Array],
        rope: Rope,
        mode: Mode,
    ) -> tuple[jax.Array, jax.Array]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = image_modulation
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = text_modulation

        text_update, image_update = self.attn(modulate(text, t_shift, t_scale), modulate(image, shift, scale), rope)
        image = image + gate * image_update
        text = text + t_gate * text_update

        image = image + mlp_gate * self.ff(modulate(image, mlp_shift, mlp_scale), mode)
        text = text + t_mlp_gate * self.ff_context(modulate(text, t_mlp_shift, t_mlp_scale), mode)
        return text, image


class ParallelAttention(nnx.Module):
    """Attention and MLP side by side: one layer computes the inputs of both, another reads the results of both."""

    def __init__(self, config: Flux2Config, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.to_qkv_mlp_proj = Linear(width, (3 + 2 * MLP) * width, bias=False, dtype=dtype, rngs=rngs)
        self.to_out = Linear((1 + MLP) * width, width, bias=False, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.norm_q = RMSNorm(config.attention_head_dim, eps=1e-6, dtype=dtype)
        self.norm_k = RMSNorm(config.attention_head_dim, eps=1e-6, dtype=dtype)

    def __call__(self, x: jax.Array, rope: Rope, mode: Mode) -> jax.Array:  # [B, S, D] -> [B, S, D]
        parts = in_groups(self.to_qkv_mlp_proj(x, mode), 3 + 2 * MLP)
        projected = [parts[:, :, :, i].reshape(x.shape) for i in range(3)]
        q, k, v = split_heads(projected, self.norm_q, self.norm_k)
        out = join_heads(attention(rotate(q, rope), rotate(k, rope), v)).reshape(*parts.shape[:3], 1, -1)
        both = jnp.concatenate([out, gated(parts[:, :, :, 3:])], axis=3)  # [B, S, G, 1 + MLP, c]
        return self.to_out(both.reshape(*x.shape[:2], -1), mode)


class SingleBlock(nnx.Module):
    """Text and image in one sequence: attention and MLP in parallel, modulated and gated."""

    def __init__(self, config: Flux2Config, *, dtype: Any, rngs: nnx.Rngs):
        self.attn = ParallelAttention(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, modulation: list[jax.Array], rope: Rope, mode: Mode) -> jax.Array:
        shift, scale, gate = modulation
        return x + gate * self.attn(modulate(x, shift, scale), rope, mode)


class Flux2(nnx.Module):
    """The backbone. Computes in `dtype`; weights are stored in `param_dtype`."""

    def __init__(
        self, config: Flux2Config, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.dtype = dtype
        options = {"bias": False, "dtype": param_dtype, "rngs": rngs}
        self.x_embedder = Linear(config.in_channels, config.width, axes=(None, "embed"), **options)
        self.context_embedder = Linear(config.joint_attention_dim, config.width, axes=(None, "embed"), **options)
        self.time_guidance_embed = TimeGuidanceEmbedding(config, dtype=param_dtype, rngs=rngs)
        self.double_stream_modulation_img = Modulation(config.width, 6, **options)
        self.double_stream_modulation_txt = Modulation(config.width, 6, **options)
        self.single_stream_modulation = Modulation(config.width, 3, **options)
        self.transformer_blocks = stack(
            lambda rngs: DoubleBlock(config, dtype=param_dtype, rngs=rngs), config.num_layers, rngs
        )
        self.single_transformer_blocks = stack(
            lambda rngs: SingleBlock(config, dtype=param_dtype, rngs=rngs), config.num_single_layers, rngs
        )

    def __call__(
        self, tokens: jax.Array, sigma: jax.Array, conditioning: Flux2Conditioning, mode: Mode = TEACHER
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden image tokens [B, N, D] and the time embedding [B, D].

        Args:
          tokens: packed latents, [B, N, in_channels].
          sigma: noise level in [0, 1], [B].
          conditioning: see Flux2Conditioning.
          mode: teacher, or student with its adapters.
        """
        count = tokens.shape[1]
        tokens, positions = beside_references(tokens, conditioning.positions, conditioning.references)
        image = self.x_embedder(tokens.astype(self.dtype))
        # States between the layers of a language model are not normed
        text = self.context_embedder(saturated(conditioning.text.astype(self.dtype)))
        temb = self.time_guidance_embed(sigma, conditioning.guidance, self.dtype, mode.fold(0))
        of_image, of_text = self.double_stream_modulation_img(temb), self.double_stream_modulation_txt(temb)
        of_both = self.single_stream_modulation(temb)
        length = text.shape[1]
        rope = rotary(
            jnp.concatenate([text_positions(length), positions]),
            self.config.axes_dims_rope,
            self.config.rope_theta,
        )

        def shard(tokens: jax.Array) -> jax.Array:  # [B, .., D]
            return constrain(saturated(tokens), "batch", "tokens", None)

        def double(block: DoubleBlock, carry: Any, mode: Mode) -> Any:
            return jax.tree.map(shard, block(*carry, of_text, of_image, rope, mode))

        def single(block: SingleBlock, carry: Any, mode: Mode) -> Any:
            return shard(block(carry, of_both, rope, mode))

        text, image = scan_blocks(self.transformer_blocks, (shard(text), shard(image)), double, mode.fold(1))
        joined = shard(jnp.concatenate([text, image], axis=1))  # [B, S, D]
        joined = scan_blocks(self.single_transformer_blocks, joined, single, mode.fold(2))
        return shard(joined[:, length : length + count]), temb


def text_positions(length: int) -> jax.Array:  # [T, 4]
    """(0, 0, 0, index) of each text token."""
    return jnp.zeros((length, 4)).at[:, 3].set(jnp.arange(length))
