"""Accelerators: peak rates, memory, and what a compiler for them has to know."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA decides by when it compiles for an NVIDIA GPU; sizes in bytes.

    Attributes:
      capability: CUDA compute capability.
      cores: streaming multiprocessors.
      fpus: float32 units of a core.
      clock: highest clock rate, GHz.
      l2: second-level cache.
      shared: shared memory of a core; a block may have 1 KiB less.
      threads: that a core holds at once.
    """

    capability: tuple[int, int]
    cores: int
    fpus: int
    clock: float
    l2: int
    shared: int
    threads: int


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates and memory of one JAX device.

    Attributes:
      flops: bfloat16 matrix operations per second, without sparsity, summed in float32.
      memory: bytes that a program sees.
      bandwidth: memory bandwidth in bytes per second.
      kinds: the names that JAX has for it (`jax.Device.device_kind`).
      gpu: of a GPU.
    """

    flops: float
    memory: float
    bandwidth: float
    kinds: tuple[str, ...]
    gpu: Gpu | None = None


KIB, MIB = 2**10, 2**20
# TPUs: Google Cloud TPU documentation, "System architecture", one page per version. GPUs: rates from NVIDIA's data
# sheets (H100, H200, A100, L40S, DGX B200) and white papers (Ada and Ampere GA102); numbers of units, caches, clocks
# and memory from there, from the CUDA C++ programming guide ("Compute capabilities"), and, for H100, H200, B200 and
# A100, from OpenXLA's target specifications (openxla/xla, xla/backends/gpu/target_config/specs).
CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, ("TPU v6 lite", "TPU v6e")),
    "tpu7x": Chip(2307e12 / 2, 96 * GIB, 7380e9 / 2, ("TPU7x", "TPU v7x")),  # a chip is two devices
    "h100": Chip(
        989e12,
        84_942_979_072,
        3352e9,
        ("NVIDIA H100 80GB HBM3",),
        Gpu((9, 0), 132, 128, 1.98, 50 * MIB, 228 * KIB, 2048),
    ),
    "h200": Chip(
        989e12,
        151_397_597_184,
        4800e9,
        ("NVIDIA H200",),
        Gpu((9, 0), 132, 128, 1.98, 50 * MIB, 228 * KIB, 2048),
    ),
    "b200": Chip(
        2250e12,
        191_514_411_008,
        7672e9,
        ("NVIDIA B200",),
        Gpu((10, 0), 148, 128, 1.965, 132_644_864, 228 * KIB, 2048),
    ),
    "a100": Chip(
        312e12,
        85_100_068_864,
        2039e9,
        ("NVIDIA A100-SXM4-80GB",),
        Gpu((8, 0), 108, 64, 1.41, 40 * MIB, 164 * KIB, 2048),
    ),
    "l40s": Chip(
        362e12,
        45 * GIB,  # of 48: error correction takes the rest
        864e9,
        ("NVIDIA L40S",),
        Gpu((8, 9), 142, 128, 2.52, 96 * MIB, 100 * KIB, 1536),
    ),
    "rtx4090": Chip(
        165.2e12,
        24_564 * MIB,
        1008e9,
        ("NVIDIA GeForce RTX 4090",),
        Gpu((8, 9), 128, 128, 2.52, 72 * MIB, 100 * KIB, 1536),
    ),
    "rtx3090": Chip(
        71e12,
        24_576 * MIB,
        936e9,
        ("NVIDIA GeForce RTX 3090",),
        Gpu((8, 6), 82, 128, 1.695, 6 * MIB, 100 * KIB, 1536),
    ),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None if it is not in the table."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
