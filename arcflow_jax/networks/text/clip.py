"""CLIP's text encoder, whose pooled vector conditions FLUX.1's modulation (transformers' CLIPTextModel).

    ids [B, N]  --encoder-->  hidden [B, N, D], pooled [B, D]

Attention is causal. `pooled` is the hidden state at the end token, the first one that attends to the whole prompt.
Attribute names are those of the checkpoint.
"""

# B batch, N tokens, D width, H heads, E head dim, L layers

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.networks.float16 import widened
from arcflow_jax.networks.layers import TEACHER, Embedding, LayerNorm, Linear, scan_blocks, stack
from arcflow_jax.schema import Epsilon, Layers, Token, Width


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": functools.partial(jax.nn.gelu, approximate=False)}

LEGACY_EOS = 2  # config.json of the first CLIP models has this wrong id: their end token has the highest id


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The model config of a CLIP text encoder, with the names of its config.json."""

    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    max_position_embeddings: Width = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    eos_token_id: Token = 49407

    def __post_init__(self) -> None:
        schema.check_multiple(self, "hidden_size", "num_attention_heads")


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPTextConfig, *, dtype: Any, rngs: nnx.Rngs):
        def linear(axes: tuple[str, str]) -> Linear:
            return Linear(config.hidden_size, config.hidden_size, axes=axes, dtype=dtype, rngs=rngs)

        self.q_proj = linear(("embed", "heads"))
        self.k_proj = linear(("embed", "heads"))
        self.v_proj = linear(("embed", "heads"))
        self.out_proj = linear(("heads", "embed"))
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, N, D] -> [B, N, D]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in projections)  # [B, N, H, E]
        return self.out_proj(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: CLIPTextConfig, *, dtype: Any, rngs: nnx.Rngs):
        d, hidden = config.hidden_size, config.intermediate_size
        self.fc1 = Linear(d, hidden, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, d, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nnx.Module):
    """Attention, then the MLP, each on normed tokens and with a residual connection."""

    def __init__(self, config: CLIPTextConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEncoder(nnx.Module):
    """See the module docstring. Computes in the dtype of its embedding table; of float16, in float32."""

    def __init__(self, config: CLIPTextConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        d = config.hidden_size
        self.token_embedding = Embedding(config.vocab_size, d, dtype=dtype, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, d, dtype=dtype, rngs=rngs)
        self.layers = stack(lambda rngs: Layer(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, rngs)
        self.final_layer_norm = LayerNorm(d, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:  # [B, N] -> [B, N, D], [B, D]
        """Hidden states after the final norm, and the pooled vector. Raises ValueError if there are too many tokens."""
        tokens = ids.shape[1]
        if tokens > self.config.max_position_embeddings:
            raise ValueError(f"{tokens} tokens, but the encoder has {self.config.max_position_embeddings} positions")
        x = self.token_embedding(ids) + self.position_embedding(jnp.arange(tokens))
        x = scan_blocks(self.layers, widened(x), lambda layer, x, _: layer(x), TEACHER)
        hidden = self.final_layer_norm(x)
        # argmax finds the first end token; the padding after it may have the same id
        legacy = self.config.eos_token_id == LEGACY_EOS
        end = jnp.argmax(ids if legacy else ids == self.config.eos_token_id, axis=-1)  # [B]
        return hidden, jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
