"""Accelerators, by the first part of a topology's name. Rates are peaks from the vendor's published tables."""

from __future__ import annotations

import dataclasses

from arcflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates and memory of one JAX device.

    Attributes:
      flops: bfloat16 matrix operations per second.
      memory: bytes.
      bandwidth: memory bandwidth in bytes per second.
    """

    flops: float
    memory: float
    bandwidth: float


GIB = 2**30
# Google Cloud TPU documentation, "System architecture", one page per version
CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9),
    "tpu7x": Chip(2307e12 / 2, 96 * GIB, 7380e9 / 2),  # a chip is two devices
}


def chip(topology: str) -> Chip:
    """The chip of a topology such as "v5p:2x2x1". Raises UserError if its name is unknown."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not shape:
        raise UserError(f"unknown topology {topology!r}: give one of {', '.join(CHIPS)} with a shape, such as v6e:2x4")
    return CHIPS[name]
