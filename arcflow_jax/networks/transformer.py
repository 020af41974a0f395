"""The parts that the diffusion transformers share: embeddings, rotary positions, modulation, attention, MLP.

A network's own file has its blocks and the order of its tokens. Attribute names are those of the checkpoints.
"""

# B batch, S tokens, D width, H heads, E head dim

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from arcflow_jax.errors import UserError
from arcflow_jax.networks.layers import TEACHER, LayerNorm, Linear, Mode, RMSNorm
from arcflow_jax.parallel.mesh import constrain

Rope = tuple[jax.Array, jax.Array]  # cosine and sine of the rotary angles, [S, E/2] each
Heads = tuple[jax.Array, jax.Array, jax.Array]  # queries, keys and values, [B, S, H, E] each


def check_rope(axes_dims_rope: tuple[int, ...], attention_head_dim: int) -> None:
    """Raises UserError unless the rotary axes share out the features of a head."""
    if sum(axes_dims_rope) != attention_head_dim:
        raise UserError(
            f"axes_dims_rope {tuple(axes_dims_rope)} adds up to {sum(axes_dims_rope)}, "
            f"but has to add up to attention_head_dim, {attention_head_dim}"
        )
    if any(features % 2 for features in axes_dims_rope):
        raise UserError(f"axes_dims_rope is {tuple(axes_dims_rope)}, but its numbers have to be even")


def sinusoid(value: jax.Array, width: int) -> jax.Array:
    """Sinusoidal features of a σ or a guidance scale, [B] → [B, width], cosines first, in float32.

    The frequencies of Vaswani et al. 2017 (arXiv 1706.03762), applied to 1000 · value. Their exponents are rounded to
    float32, as in PyTorch: at angles of 1000 radians that rounding shows in the result.
    """
    half = width // 2
    exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angle = 1000.0 * value.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class EmbeddingMLP(nnx.Module):
    """linear_1, SiLU, linear_2: [B, d_in] → [B, D]."""

    def __init__(self, d_in: int, width: int, *, bias: bool = True, dtype: Any, rngs: nnx.Rngs):
        self.linear_1 = Linear(d_in, width, bias=bias, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, bias=bias, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mode: Mode = TEACHER) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x, mode)), mode)


def rotary(positions: jax.Array, axes_dims: tuple[int, ...], theta: float = 10_000.0) -> Rope:
    """Cosine and sine of the rotary angles, each [S, E/2] float32, of positions [S, axes] (arXiv 2104.09864)."""
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles.append(positions[:, axis, None].astype(jnp.float32) * frequencies.astype(np.float32))
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates each pair of neighbouring features of x [B, S, H, E] by its angle, in float32."""
    cos, sin = (t[None, :, None, :] for t in rope)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


class Modulation(nnx.Module):
    """The shifts, scales and gates of blocks: `count` vectors [B, 1, D] computed from the time embedding."""

    def __init__(self, width: int, count: int, *, bias: bool = True, dtype: Any, rngs: nnx.Rngs):
        self.linear = Linear(width, count * width, bias=bias, dtype=dtype, rngs=rngs)
        self.count = count

    def __call__(self, temb: jax.Array) -> list[jax.Array]:
        y = self.linear(jax.nn.silu(temb))
        if not jax.sharding.get_abstract_mesh().empty:
            # Replicated over the mesh: if it were sharded by features, the tokens it modulates would be as well
            y = jax.lax.with_sharding_constraint(y, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))
        return jnp.split(y[:, None], self.count, axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer norm without weights of its own, then the block's scale and shift."""
    return LayerNorm(x.shape[-1], eps=1e-6, affine=False)(x) * (1 + scale) + shift


class FeedForward(nnx.Module):
    """The MLP of a block, with a hidden width of 4 D."""

    def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.proj_in = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(4 * width, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return self.proj_out(jax.nn.gelu(self.proj_in(x, mode), approximate=True), mode)


def head_projection(width: int, *, bias: bool = True, dtype: Any, rngs: nnx.Rngs) -> Linear:
    """A linear layer from tokens to all heads."""
    return Linear(width, width, bias=bias, axes=("embed", "heads"), dtype=dtype, rngs=rngs)


def qkv(x: jax.Array, to_q: Linear, to_k: Linear, to_v: Linear, norm_q: RMSNorm, norm_k: RMSNorm) -> Heads:
    """Queries, keys (both RMS-normed per head) and values of tokens x [B, S, D], each [B, S, H, E]."""
    return split_heads([linear(x) for linear in (to_q, to_k, to_v)], norm_q, norm_k)


def split_heads(projected: list[jax.Array], norm_q: RMSNorm, norm_k: RMSNorm) -> Heads:
    """`qkv`, given the results [B, S, D] of its projections."""
    head_dim = norm_q.scale.shape[-1]
    # Without the barrier XLA for TPUs folds the split into heads into the products, and for that keeps a transposed
    # copy of all the stacked weights: 2.6 GiB for FLUX.1-dev
    projected = jax.lax.optimization_barrier(projected)
    heads = (y.reshape(*y.shape[:-1], -1, head_dim) for y in projected)
    q, k, v = (constrain(y, "batch", None, "attending_heads", None) for y in heads)
    return norm_q(q), norm_k(k), v


def join_heads(out: jax.Array) -> jax.Array:  # [B, S, H, E] -> [B, S, D]
    """The result of attention as tokens again, sharded as tokens are."""
    return constrain(out.reshape(*out.shape[:2], -1), "batch", "tokens", "heads")


class JointProjections(nnx.Module):
    """The projections of an attention over text and image tokens together; text and image have their own weights."""

    def __init__(self, width: int, head_dim: int, *, bias: bool = True, dtype: Any, rngs: nnx.Rngs):
        def project() -> Linear:
            return head_projection(width, bias=bias, dtype=dtype, rngs=rngs)

        def output() -> Linear:
            return Linear(width, width, bias=bias, axes=("heads", "embed"), dtype=dtype, rngs=rngs)

        def norm() -> RMSNorm:
            return RMSNorm(head_dim, eps=1e-6, dtype=dtype)

        self.to_q, self.to_k, self.to_v, self.to_out = project(), project(), project(), output()
        self.add_q_proj, self.add_k_proj, self.add_v_proj, self.to_add_out = project(), project(), project(), output()
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = norm(), norm(), norm(), norm()

    def text_heads(self, text: jax.Array) -> Heads:
        return qkv(text, self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k)

    def image_heads(self, image: jax.Array) -> Heads:
        return qkv(image, self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k)

    def outputs(self, text: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Attention's results for the text and image tokens, [B, .., H, E], to their updates [B, .., D]."""
        return self.to_add_out(join_heads(text)), self.to_out(join_heads(image))


def concatenate_heads(first: Heads, second: Heads) -> Heads:
    """The queries, keys and values of two groups of tokens, one group after the other."""
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    return q, k, v
