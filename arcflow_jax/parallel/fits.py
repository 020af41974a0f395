"""What fits on a device: the memory that sampling and training need, and what to change where it does not suffice.

No JAX here, and no device: sizes in, text out.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Literal

from arcflow_jax.parallel.chips import GIB

# Keeps networks in host memory while they do not run; or their stacked blocks also while they do (see `offload`)
Offload = Literal["networks", "blocks"]

FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # environment variable: JAX's share of a GPU, which it takes at once
DEFAULT_SHARE, LARGE_SHARE = 0.75, 0.9

# GiB at 1024 × 1024 on one H100, by compile-report, 2026-11-24 to 2026-11-30. To measure a row again:
#   arcflow compile-report --topology h100 --config flux --config.model=configs/flux.1-dev --config.adapter.rank=64
#       with --program text-encoder, sampler or vae-decoder, of which the largest counts, and --quantize or --offload
#   and, for training, --program train-steady with --config flux:single --batch 16, or --config flux:published --batch 4
#       --config.remat=full, in place of the rank (flux2, configs/flux.2-klein-4b; qwen, configs/qwen-image)
Row = tuple[str, str, str, float]  # model, what it does, weights, GiB
SAMPLING, STREAMING = "sampling, --offload networks", "sampling, --offload blocks"
PUBLISHED, SMALL = "training, published recipe, batch 4", "training, recipe `single`"
MEASURED: tuple[Row, ...] = (
    ("FLUX.1-dev", SAMPLING, "bf16", 22.5),
    ("FLUX.1-dev", SAMPLING, "int8", 11.9),
    ("FLUX.1-dev", SAMPLING, "int4", 7.0),
    ("FLUX.1-dev", STREAMING, "bf16", 2.6),
    ("FLUX.1-dev", PUBLISHED, "bf16", 44.3),
    ("FLUX.1-dev", SMALL, "int8", 15.7),
    ("FLUX.1-dev", SMALL, "int4", 10.8),
    ("FLUX.2 [klein] 4B", SAMPLING, "bf16", 7.7),
    ("FLUX.2 [klein] 4B", SAMPLING, "int8", 4.6),
    ("FLUX.2 [klein] 4B", SAMPLING, "int4", 3.1),
    ("FLUX.2 [klein] 4B", STREAMING, "bf16", 2.6),
    ("FLUX.2 [klein] 4B", "training, flux2:4b, batch 4", "bf16", 19.0),
    ("FLUX.2 [klein] 4B", SMALL, "int8", 8.9),
    ("FLUX.2 [klein] 4B", SMALL, "int4", 7.4),
    ("FLUX.2 [klein] 9B", SAMPLING, "bf16", 17.7),
    ("FLUX.2 [klein] 9B", SAMPLING, "int8", 9.9),
    ("FLUX.2 [klein] 9B", "training, rank 64, batch 1", "int8", 17.8),
    ("Qwen-Image", SAMPLING, "bf16", 38.2),
    ("Qwen-Image", SAMPLING, "int8", 19.7),
    ("Qwen-Image", SAMPLING, "int4", 11.4),
    ("Qwen-Image", STREAMING, "bf16", 1.9),
    ("Qwen-Image", PUBLISHED, "bf16", 70.3),
    ("Qwen-Image", SMALL, "int8", 25.4),
    ("Qwen-Image", SMALL, "int4", 17.1),
)

# Beside the weights, bytes per pixel of one image: the sampler of both models, and FLUX.1's VAE, the larger one, see
# docs/sample.md
SAMPLER, DECODER, TILED_DECODER = 400, 2600, 1300
INT8, INT4 = 8, 4.5  # bits of a weight, with int4's scales
STREAMED = 0.15  # of a network's weights, what the device holds while its blocks are streamed


def gpu_share() -> float:
    """The share of a GPU's memory that JAX takes, as environment variables set it."""
    return float(os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get(FRACTION) or DEFAULT_SHARE)


@dataclasses.dataclass(frozen=True)
class Load:
    """What a pipeline puts on one device.

    Attributes:
      components: bytes of the weights of each component, as they are loaded; of the VAE only the decoder's.
      bits: of a weight of text encoders and transformer.
      offload, tiled: as in `ArcFlowPipeline.from_pretrained`.
      side: of the images, in pixels.
    """

    components: Mapping[str, float]
    bits: float = 16
    offload: Offload | None = None
    tiled: bool = False
    side: int = 1024

    def quantized(self, bits: float) -> Load:
        """With text encoders and transformer of fewer bits."""
        held = {name: n if name == "vae" else n * bits / self.bits for name, n in self.components.items()}
        return dataclasses.replace(self, components=held, bits=bits)

    @property
    def needed(self) -> float:
        """The most bytes that the device holds at a time, at batch size 1."""
        pixels, held = self.side**2, dict(self.components)
        sampling, decoding = pixels * SAMPLER, pixels * (TILED_DECODER if self.tiled else DECODER)
        if self.offload is None:
            return sum(held.values()) + max(sampling, decoding)
        if self.offload == "blocks":
            held = {name: n if name == "vae" else n * STREAMED for name, n in held.items()}
        transformer, decoder = held.pop("transformer") + sampling, held.pop("vae") + decoding
        return max(transformer, decoder, sum(held.values()))


def changes(load: Load) -> Iterator[tuple[str, Load]]:
    """What a user can change, by itself, in the order of what costs least, and then together."""
    int8, int4 = load.quantized(INT8), load.quantized(INT4)
    if load.bits > INT8:
        yield "int8 weights (arcflow quantize)", int8
    if load.bits > INT4:
        yield "int4 weights (arcflow quantize)", int4
    if load.offload is None:
        yield "--offload networks", dataclasses.replace(load, offload="networks")
    if load.offload != "blocks":
        yield "--offload blocks", dataclasses.replace(load, offload="blocks")
    small = load.side // 2
    yield f"images of {small}x{small}", dataclasses.replace(load, side=small)
    if not load.tiled:
        yield "tiles (--vae-tiling)", dataclasses.replace(load, tiled=True)


def together(load: Load) -> Iterator[tuple[str, Load]]:
    """Several of `changes`, fewest first."""
    for bits, name in ((INT8, "int8"), (INT4, "int4")):
        if load.bits > bits:
            both = dataclasses.replace(load.quantized(bits), offload="blocks")
            yield f"{name} weights (arcflow quantize) with --offload blocks", both
            yield (
                f"{name} weights (arcflow quantize) with --offload blocks and --vae-tiling",
                dataclasses.replace(both, tiled=True),
            )


def advice(load: Load, memory: float) -> list[str]:
    """Which changes make a load fit into so many bytes: each that does by itself, or else the first ones together."""
    alone = [name for name, changed in changes(load) if changed.needed <= memory]
    return alone or [name for name, changed in together(load) if changed.needed <= memory][:1]


def explained(load: Load, kind: str, limit: float, share: float | None) -> str:
    """One line: a device's memory, what a model needs, and what would fit.

    Args:
      load: what did not fit.
      kind: the device's name.
      limit: bytes that JAX has of its memory.
      share: what part of its memory that is, on a GPU of which JAX takes a part; else None.
    """
    size = f"this {kind} has {limit / GIB:.1f} GiB"
    more = 0.0
    if share is not None:
        more = limit / share * LARGE_SHARE
        size = f"JAX takes {limit / GIB:.1f} of the {limit / share / GIB:.1f} GiB of this {kind}"
        size += f" ({FRACTION}={LARGE_SHARE} takes {more / GIB:.1f})" if share < LARGE_SHARE else ""
    needs = f"the model needs {load.needed / GIB:.1f} GiB for one image of {load.side}x{load.side}"
    if fitting := advice(load, limit):
        return f"{size}, {needs}; what fits: {', '.join(fitting)}"
    if fitting := advice(load, more):
        return f"{size}, {needs}; what fits with {FRACTION}={LARGE_SHARE}: {', '.join(fitting)}"
    return f"{size}, {needs}: use a larger device, or several (mesh)"


def verdict(needed: float, limit: float, share: float | None) -> str:
    """Whether so many bytes fit on a device; arguments as for `explained`."""
    if needed <= limit:
        return "yes"
    if share is not None and needed <= limit / share * LARGE_SHARE:
        return f"with {FRACTION}={LARGE_SHARE}"
    return "no"
