"""Memory and speed of `arcflow convert` on a model of FLUX.1-dev's size, with random weights.

    python benchmarks/convert_full_size.py --folder /tmp/flux-size

writes a diffusers folder of FLUX.1-dev's exact geometry (24 GB of bfloat16; T5 cut to two layers unless told
otherwise), converts it in a process of its own, prints that process's peak resident memory and speed, and removes
everything. It needs twice the model's size on the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np
from flax import nnx

from arcflow_jax.components import PIPELINES, TOKENIZERS
from arcflow_jax.convert.engine import fills, shapes_of
from arcflow_jax.geometry import geometry

NETWORKS = PIPELINES["FluxPipeline"]


def configs(double: int, single: int, t5_layers: int) -> dict[str, dict[str, Any]]:
    """The config.json of each component of FLUX.1-dev."""
    return {
        "transformer": {
            "in_channels": 64,
            "num_layers": double,
            "num_single_layers": single,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        "text_encoder": {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "text_encoder_2": {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": t5_layers,
            "num_heads": 64,
        },
        "vae": {
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 16,
            "norm_num_groups": 32,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
    }


def source_shapes(component: str, config: dict[str, Any], original: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a component's checkpoint, in diffusers' layout or the authors'."""
    network = NETWORKS[component]
    config = geometry(network.geometry, config, component)
    table = network.original(config) if original else network.table
    plan = fills(table, shapes_of(nnx.state(network.abstract(config))))
    return {name: fill.source_shape for fill in plan for name in fill.names}


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """A safetensors file of random bfloat16 numbers, one tensor in memory at a time."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + nbytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # Parts of one pool, each from another place: random numbers are dear, and a chunk of a checkpoint is smaller
    pool = (0.02 * rng.standard_normal(2**24, np.float32)).astype(ml_dtypes.bfloat16)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                start = int(rng.integers(len(pool)))
                part = pool[start : start + left]
                file.write(part.view(np.uint8))
                left -= len(part)


def shards(shapes: dict[str, tuple[int, ...]], size: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in groups of at most `size` bytes."""
    group: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if group and sum(map(nbytes, group.values())) + nbytes(shape) > size:
            yield group
            group = {}
        group[name] = shape
    yield group


def write_source(folder: Path, options: argparse.Namespace) -> list[str]:
    """Writes the model, and returns what `arcflow convert` is to be told beside `--source` and `--out`."""
    rng = np.random.default_rng(0)
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatch"]}
    arguments = []
    for component, config in configs(options.double, options.single, options.t5_layers).items():
        index[component] = ["library", NETWORKS[component].class_name]
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(config))
        original = options.original and NETWORKS[component].original is not None
        shapes = source_shapes(component, config, original)
        if original:
            file = folder / f"{component}.safetensors"
            write_file(file, shapes, rng)
            arguments += [f"--{component}", str(file)]
            continue
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        weight_map = {}
        for number, shard in enumerate(shards(shapes, int(options.shard_gb * 1e9)), 1):
            file = folder / component / f"{stem}-{number:05d}.safetensors"
            write_file(file, shard, rng)
            weight_map |= dict.fromkeys(shard, file.name)
        (folder / component / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in TOKENIZERS["FluxPipeline"]:
        (folder / name).mkdir()
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    return arguments


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for source and result; must not exist yet")
    parser.add_argument("--double", type=int, default=19, help="double blocks")
    parser.add_argument("--single", type=int, default=38, help="single blocks")
    parser.add_argument("--t5-layers", type=int, default=2, help="T5-XXL has 24, 9.5 GB")
    parser.add_argument("--shard-gb", type=float, default=10, help="largest shard")
    parser.add_argument("--original", action="store_true", help="the authors' single files in place of diffusers'")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        source, out = options.folder / "source", options.folder / "converted"
        start = time.perf_counter()
        arguments = write_source(source, options)
        size = size_of(source)
        print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)

        command = ["-c", "from arcflow_jax.cli import main; main()", "convert", "--source", source, "--out", out]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *map(str, command), *arguments])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            sys.exit(f"arcflow convert failed with status {status}")
        print(f"converted to {size_of(out) / 1e9:.2f} GB in {seconds:.0f} s, {size / 1e6 / seconds:.0f} MB/s")
        print(f"processor time {usage.ru_utime:.0f} s in user code, {usage.ru_stime:.0f} s in the system")
        print(f"peak resident memory {usage.ru_maxrss * 1024 / 1e9:.2f} GB")  # Linux counts in KiB
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
