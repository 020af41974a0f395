"""The layers of all networks here: linear with an optional LoRA, norms, convolution, stacks of blocks.

Weights are NNX variables of one of two types. `Base` is the frozen teacher; `Adapter` is what distillation trains. They
are siblings, so a filter on one never catches the other: gradients, optimizer, EMA and checkpoints see `Adapter` only.
Each variable has `axes`, the logical names of its trailing dimensions, which `parallel.mesh` maps to mesh axes.

Weights are cast to the dtype of the activations where they are used. Norms compute in float32.
"""

# B batch, N tokens, D width, r LoRA rank, L stacked layers; H, W, C height, width, channels of an image

from __future__ import annotations

import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from arcflow_jax.networks.dropout import dropout
from arcflow_jax.networks.kernel import QuantizedKernel
from arcflow_jax.parallel.offload import on_host

Axes = tuple[str | None, ...]

# What the backward pass computes again of each block: all of it; all but attention; or only what costs no matrix
# product. It keeps what is not computed again in memory
Remat = Literal["full", "attention", "none"]
PRODUCT, ATTENTION = "product", "attention"  # names of the results that are kept


class Base(nnx.Variable):
    """A weight of the teacher: frozen during distillation."""


class Adapter(nnx.Variable):
    """A weight that distillation trains: LoRA, and the student's head with its output norm."""


class Style(nnx.Variable):
    """A weight of style LoRAs, which change what images look like, of a teacher as of its student (see `style`)."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["dropout_key"], meta_fields=["adapters", "remat"])
@dataclasses.dataclass(frozen=True)
class Mode:
    """How a network runs: as the teacher (`TEACHER`) or, with its LoRA, as the student.

    Attributes:
      adapters: whether LoRA is applied. Static: the two modes are different programs.
      dropout_key: PRNG key of the LoRA dropout, or None for no dropout (sampling, the teacher).
      remat: what the backward pass computes again. Static.
    """

    adapters: bool
    dropout_key: jax.Array | None = None
    remat: Remat = "full"

    def fold(self, index: int | jax.Array) -> Mode:
        """The same mode with a separate dropout key for block `index`."""
        if self.dropout_key is None:
            return self
        return dataclasses.replace(self, dropout_key=jax.random.fold_in(self.dropout_key, index))


TEACHER = Mode(adapters=False)


# True where only shapes are wanted: tracing the random numbers would take most of the time
shapes_only: contextvars.ContextVar[bool] = contextvars.ContextVar("shapes_only", default=False)


def abstract(build: Callable[[], nnx.Module]) -> nnx.Module:
    """The network that `build` makes, with shapes in place of arrays."""
    token = shapes_only.set(True)
    try:
        return nnx.eval_shape(build)
    finally:
        shapes_only.reset(token)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float, dtype: Any) -> jax.Array:
    """Initial weights from a normal distribution; zeros within `abstract`."""
    if shapes_only.get():
        return jnp.zeros(shape, dtype)
    return (jax.random.normal(rngs.params(), shape) * deviation).astype(dtype)


def fan_in_normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """N(0, 1/fan_in) over all but the last dimension: [.., in, out]."""
    return normal(rngs, shape, math.prod(shape[:-1]) ** -0.5, dtype)


class Linear(nnx.Module):
    """x @ kernel + bias, plus a LoRA update if one is attached and the mode applies it, plus style LoRAs in all modes.

    The kernel of a frozen layer may be quantized (see `quantization.quantize_layers`).

    Args:
      d_in, d_out: widths. kernel is [d_in, d_out].
      axes: logical names of the two dimensions of kernel.
      kind: `Base` or `Adapter`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = True,
        axes: Axes = ("embed", "mlp"),
        kind: type[nnx.Variable] = Base,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel: nnx.Variable | QuantizedKernel = kind(fan_in_normal(rngs, (d_in, d_out), dtype), axes=axes)
        self.bias = kind(jnp.zeros((d_out,), dtype), axes=axes[-1:]) if bias else None
        self.lora: LoRA | None = nnx.data(None)
        self.style: LoRA | None = nnx.data(None)

    def __call__(self, x: jax.Array, mode: Mode = TEACHER) -> jax.Array:  # [..., d_in] -> [..., d_out]
        quantized = isinstance(self.kernel, QuantizedKernel)
        y = self.kernel.multiply(x) if quantized else x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora is not None and mode.adapters:
            y = y + self.lora(x, mode)
        if self.style is not None:
            y = y + self.style(x, mode)
        return checkpoint_name(y, PRODUCT)


class LoRA(nnx.Module):
    """The low-rank update of a linear layer, (alpha / r) · (x A) B, of Hu et al. 2021 (arXiv 2106.09685).

    A is [.., d_in, r], B is [.., r, d_out]; the leading dimensions are those of a stacked kernel. Both are zero until
    `initialize`.
    """

    def __init__(
        self,
        kernel: nnx.Variable | QuantizedKernel,
        rank: int,
        *,
        alpha: float,
        dropout: float = 0.0,
        salt: int = 0,
        kind: type[nnx.Variable] = Adapter,
    ):
        *lead, d_in, d_out = kernel.shape
        in_axis, out_axis = kernel.axes
        self.a = kind(jnp.zeros((*lead, d_in, rank)), axes=(in_axis, "rank"))
        self.b = kind(jnp.zeros((*lead, rank, d_out)), axes=("rank", out_axis))
        self.scale = alpha / rank
        self.dropout = dropout
        self.salt = salt  # separates the random numbers of this layer from those of other layers

    def initialize(self, key: jax.Array) -> None:
        """A normal with standard deviation 1/r (peft's "gaussian") and B = 0.

        The update is zero, but the gradient of B is not.
        """
        rank = self.a.shape[-1]
        self.a[...] = jax.random.normal(jax.random.fold_in(key, self.salt), self.a.shape) / rank
        self.b[...] = jnp.zeros(self.b.shape)

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        if self.dropout and mode.dropout_key is not None:
            key = jax.random.fold_in(mode.dropout_key, self.salt)
            x = dropout(key, self.dropout, x)
        low = checkpoint_name(x @ self.a[...].astype(x.dtype), PRODUCT)
        return low @ self.b[...].astype(x.dtype) * self.scale


class Embedding(nnx.Module):
    """A table of vectors, [vocabulary, D], read by integer index."""

    def __init__(self, size: int, width: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.embedding = Base(normal(rngs, (size, width), 0.02, dtype), axes=("vocab", "embed"))

    def __call__(self, ids: jax.Array) -> jax.Array:  # [..., ] -> [..., D]
        return self.embedding[...][ids]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dimension, in float32; with scale and bias unless `affine` is off."""

    def __init__(self, width: int, *, eps: float, affine: bool = True, dtype: Any = jnp.float32):
        self.scale = Base(jnp.ones((width,), dtype), axes=("norm",)) if affine else None
        self.bias = Base(jnp.zeros((width,), dtype), axes=("norm",)) if affine else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last dimension, in float32."""

    def __init__(self, width: int, *, eps: float, dtype: Any = jnp.float32):
        self.scale = Base(jnp.ones((width,), dtype), axes=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation of an image [B, H, W, C] over H, W and the channels of a group, in float32."""

    def __init__(self, channels: int, groups: int, *, eps: float = 1e-6, dtype: Any = jnp.float32):
        self.scale = Base(jnp.ones((channels,), dtype), axes=("norm",))
        self.bias = Base(jnp.zeros((channels,), dtype), axes=("norm",))
        self.groups = groups
        self.eps = eps

    def __call__(self, x: jax.Array, moments: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """x normalised.

        Args:
          moments: mean and variance of each channel, [B, C] each, of a whole image of which x is a part; by default
            those of x.
        """

        def group_mean(per_channel: jax.Array) -> jax.Array:  # [B, C] -> [B, C]
            grouped = per_channel.reshape(x.shape[0], self.groups, -1)
            return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(per_channel.shape)

        # Over the pixels first, then over the channels of a group: the image is never reshaped
        y = x.astype(jnp.float32)
        means, variances = (y.mean((1, 2)), y.var((1, 2))) if moments is None else moments
        mean = group_mean(means)
        variance = group_mean(variances + jnp.square(means - mean))
        gain = jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)  # [B, C]
        shift = self.bias[...].astype(jnp.float32) - mean * gain
        return (y * gain[:, None, None] + shift[:, None, None]).astype(x.dtype)


class Conv(nnx.Module):
    """A k×k convolution of an image [B, H, W, C]; kernel is [k, k, in, out]."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] | str = "SAME",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (size, size, c_in, c_out)
        self.kernel = Base(fan_in_normal(rngs, shape, dtype), axes=(None, None, "conv_in", "conv_out"))
        self.bias = Base(jnp.zeros((c_out,), dtype), axes=("conv_out",))
        self.stride = stride
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(x.dtype)


def linear_layers(module: nnx.Module) -> dict[str, Linear]:
    """The linear layers of a network, including stacked ones, by dotted path."""
    found = {".".join(map(str, path)): node for path, node in nnx.iter_modules(module) if isinstance(node, Linear)}
    return dict(sorted(found.items()))


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` copies of a block as one module with weights [L, ...]; run it with `scan_blocks`."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_all(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return make_all(rngs)


def scan_blocks(blocks: nnx.Module, carry: Any, call: Callable[[Any, Any, Mode], Any], mode: Mode) -> Any:
    """Runs a stack of blocks in order: carry = call(block, carry, mode of that block).

    Weights may wait in host memory. Then each block is copied to the device while the block before it computes.

    The loop is a `lax.scan`, so compile time does not grow with depth. The backward pass rematerialises each block as
    `mode.remat` says; with "full", only the carry of each layer is kept.
    """
    graphdef, state = nnx.split(blocks)
    layers = jax.tree.leaves(state)[0].shape[0]

    def step(carry, layer):
        index, weights = layer
        return call(nnx.merge(graphdef, weights), carry, mode.fold(index)), None

    if on_host(state):
        return scan_streamed(step, carry, layers, state)
    # The body of a loop is compiled apart from that of its backward pass: XLA cannot merge the recomputation with it
    step = jax.checkpoint(step, policy=KEPT[mode.remat], prevent_cse=False)
    carry, _ = jax.lax.scan(step, carry, (jnp.arange(layers), state))
    return carry


def scan_streamed(step: Callable[..., Any], carry: Any, layers: int, state: Any) -> Any:
    """The loop of `scan_blocks` over weights in host memory: the device holds those of two blocks. Has no gradient."""

    def fetch(index: jax.Array | int) -> Any:
        parts = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), state)
        return jax.device_put(parts, jax.memory.Space.Device)

    def streamed(loop, index):
        carry, weights = loop
        following = fetch(jnp.minimum(index + 1, layers - 1))  # does not wait for this block, nor this block for it
        carry, _ = step(carry, (index, weights))
        return (carry, following), None

    (carry, _), _ = jax.lax.scan(streamed, (carry, fetch(0)), jnp.arange(layers))
    return carry


def run_block(block: nnx.Module, carry: Any, call: Callable[[Any, Any, Mode], Any], mode: Mode) -> Any:
    """Runs a block that is in no stack, rematerialised as those of `scan_blocks`."""
    graphdef, state = nnx.split(block)

    def step(carry, weights):
        return call(nnx.merge(graphdef, weights), carry, mode)

    return jax.checkpoint(step, policy=KEPT[mode.remat])(carry, state)


def policy(*names: str) -> Callable[..., bool]:
    """A policy of `jax.checkpoint` that keeps the results with these names, and those of cuDNN's attention.

    Its backward pass wants the sums of the softmax as well, which no name reaches.
    """

    def keeps(primitive: Primitive, *_: Any, **parameters: Any) -> bool:
        named = primitive.name == "name" and parameters["name"] in names
        return named or primitive.name == "dot_product_attention_fwd_wrapper"

    return keeps


KEPT: dict[Remat, Callable[..., bool] | None] = {
    "full": None,
    "attention": policy(ATTENTION),
    "none": policy(ATTENTION, PRODUCT),
}
