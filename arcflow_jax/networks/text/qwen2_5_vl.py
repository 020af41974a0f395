"""Qwen2.5-VL's language model, Qwen-Image's text encoder (the text part of Qwen2_5_VLForConditionalGeneration).

    ids [B, N]  --decoder layers, causal-->  hidden [B, N, D], normed

Prompts are padded at the end. A token attends only to those before it, so padding needs no mask. Without images the
three axes of the rotary embedding have equal positions, so one axis is enough. Attribute names are those of the
checkpoint.
"""

# B batch, N tokens, D width, H heads, G key and value heads, E head dim

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.errors import UserError
from arcflow_jax.networks.float16 import widened
from arcflow_jax.networks.layers import TEACHER, Embedding, Linear, RMSNorm, scan_blocks, stack
from arcflow_jax.networks.transformer import Rope, rotary
from arcflow_jax.schema import Epsilon, Layers, Theta, Width


@dataclasses.dataclass(frozen=True)
class Qwen2_5VLConfig:
    """The model config of the language model, with the names of its config.json."""

    REQUIRED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "use_sliding_window": False, "rope_type": "default"}

    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    num_key_value_heads: Width
    rms_norm_eps: Epsilon
    rope_theta: Theta = 1e6

    def __post_init__(self) -> None:
        schema.check_multiple(self, "hidden_size", "num_attention_heads")
        schema.check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise UserError(f"a head has {self.head_dim} features, but the rotary embedding needs an even number")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @staticmethod
    def flat(config: dict[str, Any]) -> dict[str, Any]:
        """A config.json with the nested fields of newer versions, `text_config` and `rope_parameters`, on top level."""
        return with_rope(config | schema.nested(config, "text_config"))


def with_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with its nested `rope_parameters`, or `rope_scaling` before transformers 5, on top level."""
    rope = schema.nested(config, "rope_parameters") or schema.nested(config, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    return config | rope | {"rope_type": "default" if kind == "mrope" else kind}


class LayerConfig(Protocol):
    """What the decoder layers of Qwen2.5 and Qwen3 read of a model config."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def rms_norm_eps(self) -> float: ...


def rotate_halves(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates each pair of features E/2 apart of x [B, N, H, E] by its angle, in float32."""
    cos, sin = (t[None, :, None, :] for t in rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention. Groups of H / G heads share keys and values (arXiv 2305.13245).

    Qwen3's has norms of queries and keys, and no biases.
    """

    def __init__(self, config: LayerConfig, *, normed: bool, dtype: Any, rngs: nnx.Rngs):
        def project(heads: int) -> Linear:
            width = heads * config.head_dim
            return Linear(config.hidden_size, width, bias=not normed, axes=("embed", "heads"), dtype=dtype, rngs=rngs)

        def norm() -> RMSNorm | None:
            return RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype) if normed else None

        self.q_proj = project(config.num_attention_heads)
        self.k_proj = project(config.num_key_value_heads)
        self.v_proj = project(config.num_key_value_heads)
        inner = config.num_attention_heads * config.head_dim
        self.o_proj = Linear(inner, config.hidden_size, bias=False, axes=("heads", "embed"), dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = norm(), norm()
        self.head_dim = config.head_dim

    def __call__(self, x: jax.Array, rope: Rope, lengths: jax.Array | None = None) -> jax.Array:
        """[B, N, D] to [B, N, D]. Of each sequence, only the first tokens are attended, by default all; lengths [B]."""
        q, k, v = (f(x).reshape(*x.shape[:2], -1, self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_halves(q, rope), rotate_halves(k, rope)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)  # [B, N, H, E]
        return self.o_proj(y.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    """The gated MLP, SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LayerConfig, *, dtype: Any, rngs: nnx.Rngs):
        def linear(d_in: int, d_out: int, axes: tuple[str, str]) -> Linear:
            return Linear(d_in, d_out, bias=False, axes=axes, dtype=dtype, rngs=rngs)

        self.gate_proj = linear(config.hidden_size, config.intermediate_size, ("embed", "mlp"))
        self.up_proj = linear(config.hidden_size, config.intermediate_size, ("embed", "mlp"))
        self.down_proj = linear(config.intermediate_size, config.hidden_size, ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention, then the MLP, each on RMS-normed tokens and with a residual connection."""

    def __init__(self, config: LayerConfig, *, normed: bool = False, dtype: Any, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, normed=normed, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rope: Rope, lengths: jax.Array | None = None) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), rope, lengths)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2_5VLText(nnx.Module):
    """See the module docstring. Computes in the dtype of its embedding table; of float16, in float32."""

    def __init__(self, config: Qwen2_5VLConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = stack(lambda rngs: Layer(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:  # [B, N] -> [B, N, D]
        rope = rotary(jnp.arange(ids.shape[1])[:, None], (self.config.head_dim,), self.config.rope_theta)
        x = scan_blocks(self.layers, widened(self.embed_tokens(ids)), lambda layer, x, _: layer(x, rope), TEACHER)
        return self.norm(x)
