"""Quantized kernels: the frozen weights of linear layers as codes of 8 or 4 bits, and scales.

    int8, fp8    a scale for each output channel; fp8 is float8_e4m3fn
    int4         a scale for each group of 32 inputs of an output channel; a byte holds two codes

A weight is code · scale, so 0 stays 0. qwix has the formats: it computes codes and scales, and products of codes. It
does not pack int4: JAX gives each code a byte on a CPU, so the packing is here.
"""

# L stacked layers

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

Format = Literal["int8", "fp8", "int4"]
Compute = Literal["int8", "fp8"]
DTYPES: dict[Format, Any] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.int4}
GROUP = 32  # inputs that share a scale in int4


class QuantizedKernel(nnx.Module):
    """Takes the place of a kernel [L, d_in, d_out], or [d_in, d_out], of a `layers.Linear`. All codes are 0.

    Attributes:
      codes: [L, d_in, d_out]; of int4 [L, d_in / 2, d_out] int8, see `pack`.
      scale: [L, 1, d_out] float32; of int4 [L, d_in / 32, d_out] bfloat16.
      compute: the format in which activations are multiplied, one scale a token; None multiplies them as they are.
    """

    def __init__(self, kernel: nnx.Variable, format: Format):
        *lead, d_in, d_out = kernel.shape
        in_axis, out_axis = kernel.axes
        kind, grouped = type(kernel), format == "int4"
        rows, dtype = (d_in // 2, jnp.int8) if grouped else (d_in, DTYPES[format])
        self.codes = kind(jnp.zeros((*lead, rows, d_out), dtype), axes=kernel.axes)
        groups, dtype, axis = (d_in // GROUP, jnp.bfloat16, in_axis) if grouped else (1, jnp.float32, None)
        self.scale = kind(jnp.zeros((*lead, groups, d_out), dtype), axes=(axis, out_axis))
        self.format = format
        self.compute: Compute | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that it stands for."""
        *lead, rows, d_out = self.codes.shape
        return (*lead, 2 * rows if self.format == "int4" else rows, d_out)

    @property
    def axes(self) -> tuple[str | None, ...]:
        return self.codes.axes

    def multiply(self, x: jax.Array) -> jax.Array:  # [..., d_in] -> [..., d_out]
        weights = quantized_array(self.codes[...], self.scale[...], self.format)
        if self.compute is None:
            return x @ qwix.dequantize(weights).astype(x.dtype)
        tokens = qwix.quantize(x.astype(jnp.float32), DTYPES[self.compute], channelwise_axes=range(x.ndim - 1))
        return qwix.dot_general(tokens, weights, (((x.ndim - 1,), (0,)), ((), ()))).astype(x.dtype)


def quantized_array(codes: jax.Array, scale: jax.Array, format: Format) -> qwix.QArray:
    """One layer's kernel as qwix has it, from codes and scales as of `quantize`."""
    return qwix.QArray(unpack(codes) if format == "int4" else codes, scale.astype(jnp.float32))


def fits(shape: Sequence[int], format: Format) -> bool:
    """Whether a kernel [.., d_in, d_out] can be quantized."""
    return format != "int4" or shape[-2] % GROUP == 0


@functools.partial(jax.jit, static_argnames="format")
def quantize(kernel: jax.Array, format: Format) -> tuple[jax.Array, jax.Array]:
    """The codes and scales of a kernel [d_in, d_out], as `QuantizedKernel` has them of each layer."""
    kernel = kernel.astype(jnp.float32)
    if format != "int4":
        quantized = qwix.quantize(kernel, DTYPES[format], channelwise_axes=(1,))
        return quantized.qvalue, quantized.scale
    quantized = qwix.quantize(kernel, jnp.int4, channelwise_axes=(1,), tiled_axes={0: GROUP}, scale_dtype=jnp.bfloat16)
    return pack(quantized.qvalue.astype(jnp.int8)), quantized.scale


def pack(codes: jax.Array) -> jax.Array:  # [d_in, d_out] -> [d_in / 2, d_out] int8
    """Rows 2i and 2i + 1, numbers from −8 to 7, as the lower and the upper half of the bytes of row i."""
    return (codes[0::2] & 15) | (codes[1::2] << 4)


def unpack(packed: jax.Array) -> jax.Array:  # [d_in / 2, d_out] int8 -> [d_in, d_out] int8
    """The inverse of `pack`."""
    halves = jnp.stack([(packed << 4) >> 4, packed >> 4], axis=1)  # shifts to the right keep the sign
    return halves.reshape(2 * packed.shape[0], packed.shape[1])
