"""What fits on a device, computed from the sizes of FLUX.1-dev: 12 billion weights, and 5 in T5-XXL."""

from __future__ import annotations

import dataclasses
import types

import jax
import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.generate import memory_watched
from arcflow_jax.parallel.chips import GIB
from arcflow_jax.parallel.fits import Load, advice, explained, verdict

FLUX = Load({"text_encoder": 0.2 * GIB, "text_encoder_2": 8.9 * GIB, "transformer": 22.2 * GIB, "vae": 0.1 * GIB})
INT8, INT4 = "int8 weights (arcflow quantize)", "int4 weights (arcflow quantize)"
NETWORKS, BLOCKS = "--offload networks", "--offload blocks"
SMALL, TILES = "images of 512x512", "tiles (--vae-tiling)"


def test_what_is_needed():
    assert FLUX.needed / GIB == pytest.approx(31.4 + 2.5, abs=0.1)
    assert dataclasses.replace(FLUX, offload="networks").needed / GIB == pytest.approx(22.2 + 0.4, abs=0.1)
    assert dataclasses.replace(FLUX, offload="blocks").needed / GIB == pytest.approx(0.15 * 22.2 + 0.4, abs=0.1)
    assert FLUX.quantized(8).needed / GIB == pytest.approx(31.3 / 2 + 0.1 + 2.5, abs=0.1)
    decoding = dataclasses.replace(FLUX, offload="networks", side=4096)
    assert decoding.needed / GIB == pytest.approx(16 * 2.5 + 0.1, abs=0.7)
    tiled = dataclasses.replace(decoding, tiled=True)  # 20 GiB, less than the transformer
    assert tiled.needed / GIB == pytest.approx(22.2 + 16 * 0.4, abs=0.3)


@pytest.mark.parametrize(
    ("gib", "load", "ways"),
    [
        (33, FLUX, [INT8, INT4, NETWORKS, BLOCKS, SMALL, TILES]),
        (24, FLUX, [INT8, INT4, NETWORKS, BLOCKS]),
        (18.3, FLUX, [INT8, INT4, BLOCKS]),
        (12, FLUX, [INT4, BLOCKS]),
        (8, FLUX, [BLOCKS]),
        (3, FLUX, [f"{INT8} with {BLOCKS}"]),
        (2, FLUX, [f"{INT4} with {BLOCKS} and --vae-tiling"]),
        (1, FLUX, []),
        (14, FLUX.quantized(8), [INT4, NETWORKS, BLOCKS]),
        (9, dataclasses.replace(FLUX.quantized(4.5), offload="networks", side=2048), ["images of 1024x1024", TILES]),
    ],
)
def test_advice_is_what_fits(gib, load, ways):
    assert advice(load, gib * GIB) == ways


def test_the_share_of_a_gpu_is_explained():
    assert explained(FLUX, "GPU", 18 * GIB, 0.75) == (
        "JAX takes 18.0 of the 24.0 GiB of this GPU (XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 takes 21.6), the model needs "
        f"33.9 GiB for one image of 1024x1024; what fits: {INT4}, {BLOCKS}"
    )
    assert explained(FLUX, "GPU", 1.3 * GIB, 0.75).endswith(
        f"what fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9: {INT4} with {BLOCKS} and --vae-tiling"
    )
    assert explained(FLUX, "TPU", 16 * GIB, None).startswith("this TPU has 16.0 GiB, the model needs")
    assert explained(FLUX, "GPU", 1 * GIB, 0.75).endswith("use a larger device, or several (mesh)")
    assert [verdict(gib * GIB, 18 * GIB, 0.75) for gib in (17.5, 21, 22)] == [
        "yes",
        "with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9",
        "no",
    ]


def test_the_error_of_a_full_device_says_what_fits(monkeypatch):
    def stats():
        return {"bytes_limit": int(18 * GIB)}

    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA GeForce RTX 4090", memory_stats=stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    with (
        pytest.raises(UserError, match=r"18\.0 of the 24\.0 GiB of this NVIDIA .* what fits: int4 .*: RESOURCE_EX"),
        memory_watched(False, lambda: FLUX),
    ):
        raise RuntimeError("RESOURCE_EXHAUSTED: 22 GiB")
