"""Accelerators, by the name that a topology starts with. Rates are peaks, from the vendor's published tables."""

from __future__ import annotations

import dataclasses

from arcflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device has.

    Attributes:
      flops: bfloat16 matrix operations a second.
      memory: bytes.
      bandwidth: of that memory, bytes a second.
    """

    flops: float
    memory: float
    bandwidth: float


GIB = 2**30
# Google Cloud TPU documentation, "System architecture", a page a version
CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9),
    "tpu7x": Chip(2307e12 / 2, 96 * GIB, 7380e9 / 2),  # a chip is two devices
}


def chip(topology: str) -> Chip:
    """Of a topology such as "v5p:2x2x1". Raises UserError if there is none of that name."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not shape:
        raise UserError(f"topology {topology!r} is unknown: known are {', '.join(CHIPS)} with a shape, as v6e:2x4")
    return CHIPS[name]
