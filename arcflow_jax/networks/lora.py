"""LoRA on the linear layers of a network: attached by name, and merged into their kernels."""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from arcflow_jax.errors import UserError
from arcflow_jax.networks.layers import LoRA, linear_layers
from arcflow_jax.networks.states import flatten, unflatten


def attach_lora(module: nnx.Module, targets: Sequence[str], *, rank: int, alpha: float, dropout: float) -> list[str]:
    """Attaches a LoRA to every linear layer that matches a target, and returns their paths.

    Args:
      targets: shell-style patterns over dotted paths, e.g. "transformer_blocks.ff.*".
      rank, alpha, dropout: see `layers.LoRA`; the update is scaled by alpha / rank.

    Raises:
      UserError: if a target matches no linear layer.
    """
    layers = linear_layers(module)
    for target in targets:
        if not fnmatch.filter(layers, target):
            raise UserError(f"LoRA target {target!r} matches no linear layer; there are {', '.join(layers)}")
    chosen = [path for path in layers if any(fnmatch.fnmatchcase(path, target) for target in targets)]
    for path in chosen:
        salt = zlib.crc32(path.encode())  # stable across runs, machines and the choice of other targets
        layer = layers[path]
        layer.lora = LoRA(layer.kernel, rank, alpha=alpha, dropout=dropout, salt=salt)
    return chosen


def merge_lora(module: nnx.Module) -> None:
    """Adds every LoRA update to its layer's kernel, rounded to the kernel's dtype, and removes the LoRA.

    The network is then the student only, and costs as much to run as the teacher.
    """
    for layer in linear_layers(module).values():
        if layer.lora is not None:
            layer.kernel[...] = merged_kernel(layer.kernel[...], layer.lora.a[...], layer.lora.b[...], layer.lora.scale)
            layer.lora = None


def scaled_lora(adapter: nnx.State, scale: float) -> nnx.State:
    """An adapter whose LoRA updates are multiplied by `scale`; its head stays as it is."""
    arrays = {path: variable.get_value() for path, variable in flatten(adapter).items()}
    return unflatten(adapter, {path: x * scale if path.endswith(".lora.b") else x for path, x in arrays.items()})


def merged_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel [.., d_in, d_out] + a [.., d_in, r] b [.., r, d_out] · scale, in float32, rounded to the kernel's dtype.

    A stacked kernel is merged in place, one layer at a time: all its layers in float32 would take far more memory than
    the kernel.
    """
    if kernel.ndim > 2:

        def one(layer: int, stacked: jax.Array) -> jax.Array:
            merged = merged_kernel(stacked[layer], a[layer], b[layer], scale)
            return jax.lax.dynamic_update_index_in_dim(stacked, merged, layer, 0)  # in place, unlike a scatter

        return jax.lax.fori_loop(0, len(kernel), one, kernel)
    update = a.astype(jnp.float32) @ b.astype(jnp.float32) * scale
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
