"""Which linear layers of a network have quantized kernels (see `kernel`)."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

from flax import nnx

from arcflow_jax.errors import UserError, first_few
from arcflow_jax.networks.kernel import Compute, Format, QuantizedKernel, fits
from arcflow_jax.networks.layers import linear_layers


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which linear layers of a network have quantized kernels.

    Attributes:
      format: of these kernels.
      layers: the dotted paths of the layers.
    """

    format: Format
    layers: tuple[str, ...]

    def of_kernel(self, path: str) -> Format | None:
        """The format of the array at a path, if that is a quantized kernel."""
        layer, _, leaf = path.rpartition(".")
        return self.format if leaf == "kernel" and layer in self.layers else None


def chosen_layers(module: nnx.Module, format: Format, kept: Sequence[str]) -> Quantization:
    """All linear layers of a network that a format fits, without those that match `kept`, shell-style patterns."""
    return Quantization(
        format,
        tuple(
            path
            for path, layer in linear_layers(module).items()
            if fits(layer.kernel.shape, format) and not any(fnmatch.fnmatchcase(path, pattern) for pattern in kept)
        ),
    )


def quantize_layers(module: nnx.Module, quantization: Quantization | None) -> None:
    """Gives the layers quantized kernels, all 0, into which a checkpoint can be loaded.

    Raises:
      UserError: if there is no such layer.
    """
    if quantization is None:
        return
    layers = linear_layers(module)
    if unknown := sorted(set(quantization.layers) - layers.keys()):
        raise UserError(f"there are no linear layers {first_few(unknown)}")
    for path in quantization.layers:
        layers[path].kernel = QuantizedKernel(layers[path].kernel, quantization.format)


def compute_in(module: nnx.Module, format: Compute | None) -> None:
    """Lets the layers with quantized kernels multiply activations in 8 bits as well; None leaves them as they are.

    Raises:
      UserError: if no kernel has this format.
    """
    if format is None:
        return
    kernels = [layer.kernel for layer in linear_layers(module).values() if isinstance(layer.kernel, QuantizedKernel)]
    if (formats := {kernel.format for kernel in kernels}) != {format}:
        found = " and ".join(sorted(formats)) or "not quantized"
        raise UserError(f"products in {format} need {format} weights, but those of this model are {found}")
    for kernel in kernels:
        kernel.compute = format
