"""float16 ends at 65504, which some activations exceed: for GPUs without bfloat16, whose range is that of float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def widened(x: jax.Array) -> jax.Array:
    """float16 as float32. The text encoders compute so, from their embeddings on: T5-XXL's tokens exceed 65504."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def saturated(x: jax.Array) -> jax.Array:
    """float16 within its range. diffusers' blocks of FLUX.1 and Qwen-Image end so, because few of their tokens, and
    few features of these, exceed it.
    """
    limit = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(x, -limit, limit) if x.dtype == jnp.float16 else x
