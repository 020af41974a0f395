"""Style LoRAs beside the weights of a network: several as one, on any linear layer, on plain and on quantized kernels.

The updates of several LoRAs add up, so they are one update, whose A and B are theirs side by side along the rank. Its
rank is padded with zeros to one of a few sizes. The arrays are arguments of the compiled program: other strengths, or
other LoRAs on the same layers with the same padded rank, run the program that is there.
"""

# L stacked layers, r LoRA rank

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
from flax import nnx

from arcflow_jax.networks.layers import LoRA, Style, linear_layers
from arcflow_jax.networks.lora import merged_kernel


@dataclasses.dataclass(frozen=True)
class Applied:
    """Style LoRAs, ready to run with a network: its graph definition with them, and their arrays."""

    graphdef: nnx.GraphDef
    state: nnx.State


def beside(graphdef: nnx.GraphDef, state: nnx.State, style: Applied | None) -> tuple[nnx.GraphDef, nnx.State]:
    """A network with its style LoRAs, if it has some."""
    return (graphdef, state) if style is None else (style.graphdef, nnx.merge_state(state, style.state))


def padded(rank: int) -> int:
    """The size to which a rank is padded: 16, 32, 64, …"""
    return max(16, 1 << (rank - 1).bit_length())


def styled(graphdef: nnx.GraphDef, state: nnx.State, layers: Iterable[str], rank: int) -> Applied:
    """A network with style LoRAs of a rank on these linear layers, by dotted path; their arrays are abstract.

    Args:
      graphdef, state: of the network, plain; the state may be abstract.
    """

    def attach(state: nnx.State) -> nnx.Module:
        network = nnx.merge(graphdef, state)
        found = linear_layers(network)
        for path in layers:
            found[path].style = LoRA(found[path].kernel, rank, alpha=rank, kind=Style)
        return network

    with_style, style, _ = nnx.split(nnx.eval_shape(attach, state), Style, ...)
    return Applied(with_style, style)


def fused(graphdef: nnx.GraphDef, state: nnx.State) -> nnx.State:
    """The state of a network whose style LoRAs are added to its kernels, rounded to their dtype.

    Pure; call it under jit. Its graph definition is that of the plain network.
    """
    network = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))  # nnx.merge uses the variables of the state itself
    for layer in linear_layers(network).values():
        if (style := layer.style) is not None:
            layer.kernel[...] = merged_kernel(layer.kernel[...], style.a[...], style.b[...], style.scale)
            layer.style = None
    return nnx.state(network)
