"""The T5 v1.1 encoder, FLUX.1's text encoder (transformers' T5EncoderModel).

    ids [B, N]  --encoder-->  hidden [B, N, D]

FLUX.1 uses no attention mask: padding is attended, and its hidden states are text tokens as well.
"""

# B batch, N tokens, D width, H heads, E head dim, L layers

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcflow_jax.errors import UserError
from arcflow_jax.networks.float16 import widened
from arcflow_jax.networks.layers import TEACHER, Base, Embedding, Linear, RMSNorm, scan_blocks, stack
from arcflow_jax.schema import Epsilon, Layers, Width


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The model config of a T5 encoder, with the names of its config.json."""

    REQUIRED: ClassVar[dict[str, Any]] = {"feed_forward_proj": "gated-gelu"}

    vocab_size: Width
    d_model: Width
    d_kv: Width
    d_ff: Width
    num_layers: Layers
    num_heads: Width
    relative_attention_num_buckets: Width = 32
    relative_attention_max_distance: Width = 128
    layer_norm_epsilon: Epsilon = 1e-6

    def __post_init__(self) -> None:
        exact = self.relative_attention_num_buckets // 4
        if not 1 <= exact < self.relative_attention_max_distance:
            raise UserError(
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}, but has to be at least 4, "
                f"and less than 4 · relative_attention_max_distance, {4 * self.relative_attention_max_distance}"
            )


def distance_buckets(distances: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket, in [0, `buckets`), of each key-minus-query distance: its row in the relative attention bias.

    Half of the buckets are for keys after the query. In each half, half of the buckets hold a single distance. The
    others grow logarithmically up to `max_distance`; larger distances share the last bucket. Mesh TensorFlow's rule.
    """
    # NumPy's float32, as in training: a logarithm that is off by one bit moves the edge of a bucket
    half = buckets // 2
    exact = half // 2
    far = np.abs(distances)
    octaves = np.log(np.maximum(far, exact).astype(np.float32) / np.float32(exact)) / math.log(max_distance / exact)
    logarithmic = np.minimum(exact + (octaves * (half - exact)).astype(np.int32), half - 1)
    return np.where(distances > 0, half, 0) + np.where(far < exact, far, logarithmic)


class Attention(nnx.Module):
    """Self-attention. T5 has the usual 1/√E in its weights, so the scores are not scaled."""

    def __init__(self, config: T5Config, *, dtype: Any, rngs: nnx.Rngs):
        def linear(d_in: int, d_out: int, axes: tuple[str, str]) -> Linear:
            return Linear(d_in, d_out, bias=False, axes=axes, dtype=dtype, rngs=rngs)

        inner = config.num_heads * config.d_kv
        self.q = linear(config.d_model, inner, ("embed", "heads"))
        self.k = linear(config.d_model, inner, ("embed", "heads"))
        self.v = linear(config.d_model, inner, ("embed", "heads"))
        self.o = linear(inner, config.d_model, ("heads", "embed"))
        self.heads = config.num_heads

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:  # [B, N, D], [1, H, N, N] -> [B, N, D]
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))  # [B, N, H, E]
        y = jax.nn.dot_product_attention(q, k, v, bias=bias, scale=1.0)
        return self.o(y.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """The gated MLP, GEGLU (arXiv 2002.05202)."""

    def __init__(self, config: T5Config, *, dtype: Any, rngs: nnx.Rngs):
        def linear(d_in: int, d_out: int, axes: tuple[str, str]) -> Linear:
            return Linear(d_in, d_out, bias=False, axes=axes, dtype=dtype, rngs=rngs)

        self.wi_0 = linear(config.d_model, config.d_ff, ("embed", "mlp"))
        self.wi_1 = linear(config.d_model, config.d_ff, ("embed", "mlp"))
        self.wo = linear(config.d_ff, config.d_model, ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class Block(nnx.Module):
    """Attention, then the MLP, each on RMS-normed tokens and with a residual connection."""

    def __init__(self, config: T5Config, *, dtype: Any, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.ff_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)
        self.ff = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.ff(self.ff_norm(x))


class T5Encoder(nnx.Module):
    """See the module docstring. Computes in the dtype of its embedding table; of float16, in float32."""

    def __init__(self, config: T5Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        # Shared by all layers; the checkpoint has it in the first block
        self.relative_attention_bias = Base(
            jnp.zeros((config.relative_attention_num_buckets, config.num_heads), dtype), axes=(None, "heads")
        )
        self.blocks = stack(lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers, rngs)
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def attention_bias(self, tokens: int) -> jax.Array:
        """The relative attention bias, added to the scores of `tokens` tokens, [1, H, N query, N key], float32."""
        buckets = distance_buckets(
            np.arange(1 - tokens, tokens),
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        by_distance = self.relative_attention_bias[...].astype(jnp.float32)[buckets]  # [2N - 1, H]
        position = jnp.arange(tokens)
        distance = position[None, :] - position[:, None]  # key minus query
        return by_distance[distance + tokens - 1].transpose(2, 0, 1)[None]

    def __call__(self, ids: jax.Array) -> jax.Array:  # [B, N] -> [B, N, D]
        bias = self.attention_bias(ids.shape[1])
        x = scan_blocks(self.blocks, widened(self.shared(ids)), lambda block, x, _: block(x, bias), TEACHER)
        return self.final_layer_norm(x)
