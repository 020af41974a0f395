"""Qwen-Image's transformer (diffusers' QwenImageTransformer2DModel) up to, not including, its output layer.

    tokens, σ, text
      → L blocks: text and image have their own weights and attend to each other
      → hidden image tokens and the time embedding

The output norm and projection are in `head.OutputLayer`, because the student retrains them. Attribute names are those
of the checkpoint. Text is padded to a static length. Its padding is never attended, so the result for a prompt depends
neither on the other prompts of its batch nor on that length.
"""

# B batch, N image tokens, T text tokens with padding, S = N + T, D width, H heads, E head dim, L blocks

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.networks.attention import attention
from arcflow_jax.networks.conditioning import interleave
from arcflow_jax.networks.float16 import saturated
from arcflow_jax.networks.layers import TEACHER, Linear, Mode, RMSNorm, run_block, scan_blocks, stack
from arcflow_jax.networks.transformer import (
    EmbeddingMLP,
    FeedForward,
    JointProjections,
    Modulation,
    Rope,
    check_rope,
    concatenate_heads,
    modulate,
    rotary,
    rotate,
    sinusoid,
)
from arcflow_jax.parallel.mesh import constrain
from arcflow_jax.schema import Layers, Width, Widths


@dataclasses.dataclass(frozen=True)
class QwenImageConfig:
    """The model config of a Qwen-Image transformer, with the names of its config.json."""

    in_channels: Width
    num_layers: Layers
    attention_head_dim: Width
    num_attention_heads: Width
    joint_attention_dim: Width
    axes_dims_rope: Widths = (16, 56, 56)

    REQUIRED: ClassVar[dict[str, Any]] = {
        "patch_size": 2,
        "guidance_embeds": False,
        "zero_cond_t": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    }

    def __post_init__(self) -> None:
        check_rope(self.axes_dims_rope, self.attention_head_dim)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@functools.partial(jax.tree_util.register_dataclass, data_fields=["text", "lengths", "positions"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QwenImageConditioning:
    """What a Qwen-Image velocity depends on besides the state and σ; see `conditioning.Conditioning`.

    Attributes:
      text: Qwen2.5-VL hidden states, [B, T, joint_attention_dim]; also finite in the padding.
      lengths: the number of text tokens before the padding, [B] int32, each at least 1.
      positions: (0, row, column) of each image token from the centre, [N, 3], as `latents.centred_positions` gives.
    """

    text: jax.Array
    lengths: jax.Array
    positions: jax.Array

    @property
    def batch_size(self) -> int:
        return len(self.text)

    def repeat(self, times: int) -> QwenImageConditioning:
        """Each example `times` times in a row."""
        if times == 1:
            return self
        text, lengths = (jnp.repeat(x, times, axis=0) for x in (self.text, self.lengths))
        return QwenImageConditioning(text, lengths, self.positions)

    def paired(self, negative: QwenImageConditioning) -> QwenImageConditioning:
        """Each example followed by its negative prompt's conditioning."""
        text, lengths = interleave(self.text, negative.text), interleave(self.lengths, negative.lengths)
        return QwenImageConditioning(text, lengths, self.positions)


class TimeEmbedding(nnx.Module):
    """The modulation vector: σ through an MLP."""

    FEATURES = 256

    def __init__(self, config: QwenImageConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.timestep_embedder = EmbeddingMLP(self.FEATURES, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, sigma: jax.Array, dtype: Any, mode: Mode) -> jax.Array:  # [B] -> [B, D]
        return self.timestep_embedder(sinusoid(sigma, self.FEATURES).astype(dtype), mode)


def joint_positions(image: jax.Array, length: int) -> jax.Array:  # [N, 3] -> [N + length, 3]
    """The positions of the image tokens, then of `length` text tokens.

    Text tokens lie on the diagonal, starting after the largest row or column of the image.
    """
    start = image[:, 1:].max() + 1
    text = jnp.broadcast_to((start + jnp.arange(length))[:, None], (length, image.shape[1]))
    return jnp.concatenate([image, text.astype(image.dtype)])


class JointAttention(JointProjections):
    """Attention over image and text tokens together. Padding is not attended."""

    def __call__(
        self, text: jax.Array, image: jax.Array, rope: Rope, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # The image first, so that the attended tokens are contiguous: fused kernels take a length but no mask
        q, k, v = concatenate_heads(self.image_heads(image), self.text_heads(text))  # [B, S, H, E]
        tokens = image.shape[1]
        out = attention(rotate(q, rope), rotate(k, rope), v, tokens + lengths)
        return self.outputs(out[:, tokens:], out[:, :tokens])


class Block(nnx.Module):
    """Text and image have their own weights: joint attention, then an MLP each, both modulated and gated."""

    def __init__(self, config: QwenImageConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.img_mod = Modulation(config.width, 6, dtype=dtype, rngs=rngs)
        self.txt_mod = Modulation(config.width, 6, dtype=dtype, rngs=rngs)
        self.attn = JointAttention(config.width, config.attention_head_dim, dtype=dtype, rngs=rngs)
        self.img_mlp = FeedForward(config.width, dtype=dtype, rngs=rngs)
        self.txt_mlp = FeedForward(config.width, dtype=dtype, rngs=rngs)

    def __call__(
        self, text: jax.Array, image: jax.Array, temb: jax.Array, rope: Rope, lengths: jax.Array, mode: Mode
    ) -> tuple[jax.Array, jax.Array]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.img_mod(temb)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = self.txt_mod(temb)

        text_update, image_update = self.attn(
            modulate(text, t_shift, t_scale), modulate(image, shift, scale), rope, lengths
        )
        image = image + gate * image_update
        text = text + t_gate * text_update

        image = image + mlp_gate * self.img_mlp(modulate(image, mlp_shift, mlp_scale), mode)
        text = text + t_mlp_gate * self.txt_mlp(modulate(text, t_mlp_shift, t_mlp_scale), mode)
        return text, image


class QwenImage(nnx.Module):
    """The backbone. Computes in `dtype`; weights are stored in `param_dtype`.

    The last block is not in the stack; it is stored under its number in the checkpoint. Its text output is not used, so
    its `txt_mlp` gets no gradient and is not a LoRA target.
    """

    def __init__(
        self, config: QwenImageConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.dtype = dtype
        options = {"dtype": param_dtype, "rngs": rngs}
        last = config.num_layers - 1
        self.img_in = Linear(config.in_channels, config.width, axes=(None, "embed"), **options)
        self.txt_norm = RMSNorm(config.joint_attention_dim, eps=1e-6, dtype=param_dtype)
        self.txt_in = Linear(config.joint_attention_dim, config.width, axes=(None, "embed"), **options)
        self.time_text_embed = TimeEmbedding(config, **options)
        self.transformer_blocks = stack(lambda rngs: Block(config, dtype=param_dtype, rngs=rngs), last, rngs)
        self.last_block = nnx.Dict({str(last): Block(config, **options)})

    def __call__(
        self, tokens: jax.Array, sigma: jax.Array, conditioning: QwenImageConditioning, mode: Mode = TEACHER
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden image tokens [B, N, D] and the time embedding [B, D].

        Args:
          tokens: packed latents, [B, N, in_channels].
          sigma: noise level in [0, 1], [B].
          conditioning: see QwenImageConditioning.
          mode: teacher, or student with its adapters.
        """
        image = self.img_in(tokens.astype(self.dtype))
        text = self.txt_in(self.txt_norm(conditioning.text.astype(self.dtype)))
        temb = self.time_text_embed(sigma, self.dtype, mode.fold(0))
        rope = rotary(joint_positions(conditioning.positions, text.shape[1]), self.config.axes_dims_rope)

        def shard(tokens: jax.Array) -> jax.Array:  # [B, .., D]
            return constrain(saturated(tokens), "batch", "tokens", None)

        def run(block: Block, carry: Any, mode: Mode) -> Any:
            return jax.tree.map(shard, block(*carry, temb, rope, conditioning.lengths, mode))

        carry = scan_blocks(self.transformer_blocks, (shard(text), shard(image)), run, mode.fold(1))
        (last,) = self.last_block.values()
        _, image = run_block(last, carry, run, mode.fold(2))
        return image, temb
