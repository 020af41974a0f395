"""Qwen3's language model as FLUX.2 [klein] reads it (transformers' Qwen3ForCausalLM without its last layers).

    ids [B, N]  --decoder layers, causal-->  states after layers 9, 18 and 27, side by side, [B, N, 3 D]

The layers are those of Qwen2.5-VL's language model, with norms of queries and keys. Those after the 27th of the 36 are
not loaded. Prompts are padded at the end. Padding attends to the tokens of the prompt, and is not attended; FLUX.2's
transformer reads its states as well. So that the ids alone say what is padding, its ids are given as their complements
~id, which are negative. Attribute names are those of the checkpoint.
"""

# B batch, N tokens, D width

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.errors import UserError
from arcflow_jax.networks.float16 import widened
from arcflow_jax.networks.layers import TEACHER, Embedding, scan_blocks, stack
from arcflow_jax.networks.text.qwen2_5_vl import Layer, with_rope
from arcflow_jax.networks.transformer import rotary
from arcflow_jax.schema import Epsilon, Layers, Theta, Width

READ = (9, 18, 27)  # the layers whose states FLUX.2 [klein] reads, counted from 1


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """The model config of the language model, with the names of its config.json."""

    REQUIRED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,
        "rope_type": "default",
    }

    vocab_size: Width
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    num_key_value_heads: Width
    rms_norm_eps: Epsilon
    rope_theta: Theta
    head_dim: Width = 128

    def __post_init__(self) -> None:
        schema.check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}, but the rotary embedding needs an even number")
        if self.num_hidden_layers <= READ[-1]:  # of just as many, the last states would be normed
            raise UserError(
                f"num_hidden_layers is {self.num_hidden_layers}, but has to be above {READ[-1]}: FLUX.2 reads the "
                f"states between the layers, after layers {', '.join(map(str, READ))}"
            )

    flat = staticmethod(with_rope)


class Qwen3Text(nnx.Module):
    """See the module docstring. Computes in the dtype of its embedding table; of float16, in float32."""

    def __init__(self, config: Qwen3Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = stack(lambda rngs: Layer(config, normed=True, dtype=dtype, rngs=rngs), READ[-1], rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:  # [B, N] -> [B, N, 3 D]
        rope = rotary(jnp.arange(ids.shape[1])[:, None], (self.config.head_dim,), self.config.rope_theta)
        lengths = (ids >= 0).sum(1)
        x = widened(self.embed_tokens(jnp.where(ids < 0, ~ids, ids)))
        read = jnp.array(READ)[:, None]

        def run(layer: Layer, carry: Any, _: Any) -> Any:
            x, states, number = carry  # the number of this layer
            x = layer(x, rope, lengths)
            return x, jnp.where(read == number, x[:, :, None], states), number + 1

        states = jnp.zeros((*ids.shape, len(READ), self.config.hidden_size), x.dtype)
        _, states, _ = scan_blocks(self.layers, (x, states, jnp.int32(1)), run, TEACHER)
        return states.reshape(*ids.shape, -1)
