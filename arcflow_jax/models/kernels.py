"""Writes a kernel quantized, layer by layer, while it is read (see `networks.kernel`)."""

# L stacked layers

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from arcflow_jax.arrays.names import on_disk
from arcflow_jax.arrays.writer import Stream
from arcflow_jax.errors import UserError
from arcflow_jax.families import Family
from arcflow_jax.models.model_directory import ArrayDigest
from arcflow_jax.networks import kernel
from arcflow_jax.networks.kernel import Format

Formats = Format | Mapping[str, Format]  # one for all that can be quantized, or component → format
TEXT_ENCODER = "text_encoder"  # how the names of text encoders begin


def quantized_streams(
    path: str,
    shape: tuple[int, ...],
    format: Format,
    read: Callable[[], Iterator[np.ndarray]],
    digests: list[tuple[str, bytes]],
) -> dict[str, Stream]:
    """What a quantized kernel is written as: its codes and its scales, by their dotted paths.

    The scales are computed with the codes and kept until they are written, next: names come in alphabetical order.

    Args:
      path, shape: of the kernel, [L, d_in, d_out] or [d_in, d_out].
      read: its layers, in order.
      digests: gets the digest of each array, once it is written.
    """
    quantize = functools.partial(kernel.quantize, format=format)
    codes, scale = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape[-2:], jnp.float32))
    scales: list[np.ndarray] = []

    def read_codes() -> Iterator[np.ndarray]:
        for layer in read():
            found, scale = map(np.asarray, quantize(layer))
            scales.append(scale)
            yield found

    def read_scales() -> Iterator[np.ndarray]:
        while scales:
            yield scales.pop(0)

    def stream(name: str, part: jax.ShapeDtypeStruct, layers: Callable[[], Iterator[np.ndarray]]) -> Stream:
        whole = (*shape[:-2], *part.shape)
        return Stream(
            whole, part.dtype, len(shape) > 2, lambda: digested(f"{path}.{name}", whole, part.dtype, layers(), digests)
        )

    return {
        on_disk(f"{path}.codes"): stream("codes", codes, read_codes),
        on_disk(f"{path}.scale"): stream("scale", scale, read_scales),
    }


def digested(
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    layers: Iterator[np.ndarray],
    digests: list[tuple[str, bytes]],
) -> Iterator[np.ndarray]:
    """The same layers. `digests` gets the digest of them all, as one array, once they have been read."""
    digest = ArrayDigest(path, shape, dtype)
    for layer in layers:
        digest.update(layer)
        yield layer
    digests.append(digest.finish())


def formats_of(family: Family, quantize: Formats | None) -> Mapping[str, Format]:
    """The format of each component that is to be quantized.

    Args:
      quantize: one format for the transformer and all text encoders, or component → format.

    Raises:
      UserError: if there is no such format, or a component that cannot be quantized.
    """
    able = [name for name in family.networks if name == "transformer" or name.startswith(TEXT_ENCODER)]
    wanted = dict.fromkeys(able, quantize) if isinstance(quantize, str) else dict(quantize or {})
    if unknown := sorted(wanted.keys() - set(able)):
        raise UserError(f"cannot quantize {', '.join(unknown)}, only {', '.join(able)}")
    if unknown := sorted(set(wanted.values()) - kernel.DTYPES.keys()):
        raise UserError(f"unknown format {', '.join(map(repr, unknown))}: use {', '.join(kernel.DTYPES)}")
    return wanted
