"""Memory and speed of `arcflow convert` on a full-size model with random weights.

    python -m benchmarks.convert_full_size --model configs/flux.1-dev --folder /tmp/flux-size
    python -m benchmarks.convert_full_size --model configs/qwen-image --folder /tmp/qwen-size --as-it-goes
    python -m benchmarks.convert_full_size --model configs/flux.1-dev --folder /tmp/flux-size --as-it-goes --in-bucket

Writes a diffusers folder in bfloat16 with the exact sizes of a folder of config files (`--set` changes them, e.g.
`--set text_encoder_2.num_layers=2`), converts it in a child process, prints that process's peak resident memory and
speed, and removes everything. This needs twice the model's size on the disk. With `--as-it-goes` it needs the size
only once: each tensor is written just before it is read, and its disk space is freed right after. With `--in-bucket`
the result goes to gs://, to an emulator in a process of its own, which keeps the objects in FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np
from flax import nnx

from arcflow_jax import families, schema
from arcflow_jax.cli import app as cli
from arcflow_jax.convert.engine import fills
from arcflow_jax.families import Network
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.storage.files import read_json
from arcflow_jax.storage.paths import as_path, sizes_below
from arcflow_jax.storage.safetensors import FileTensor, read_header
from tests.helpers.buckets import bucket

POOL = 2**24 - 3  # random numbers, reused because they are slow to draw


def source_shapes(network: Network, config: dict[str, Any], original: bool) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a component's checkpoint, in diffusers' layout or the authors'."""
    config = schema.parse(network.config, config, network.class_name)
    table = network.original(config) if original else network.table
    plan = fills(table, shapes_of(nnx.state(network.abstract(config))))
    return {name: fill.source_shape for fill in plan for name in fill.names}


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def make_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 numbers, at first all holes, which take no disk space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + nbytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


class Values:
    """Fills holes with random numbers, which depend only on the position in the file.

    Vectors get absolute values: a batch norm's variance is one. The scales of a video VAE's norms,
    C × 1 × 1 × 1, are near 1: with values near 0, its decoder makes almost the same image of all latents.
    """

    def __init__(self):
        numbers = 0.02 * np.random.default_rng(0).standard_normal(POOL, np.float32)
        self.bytes = numbers.astype(ml_dtypes.bfloat16).view(np.uint8)
        self.positive = np.abs(numbers).astype(ml_dtypes.bfloat16).view(np.uint8)
        self.scales = (1 + numbers).astype(ml_dtypes.bfloat16).view(np.uint8)

    def write(self, tensor: FileTensor) -> None:
        """Writes a tensor through to the disk, so that reading it reads the disk."""
        numbers = self.bytes
        if tensor.shape[:1] == (math.prod(tensor.shape),):
            numbers = self.positive if len(tensor.shape) == 1 else self.scales
        place, stop = tensor.offset, tensor.offset + nbytes(tensor.shape)
        with tensor.path.open("r+b", buffering=0) as file:
            file.seek(place)
            while place < stop:
                start = place % len(numbers)
                place += file.write(numbers[start : start + stop - place])
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), tensor.offset, nbytes(tensor.shape), os.POSIX_FADV_DONTNEED)


def shards(shapes: dict[str, tuple[int, ...]], size: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in groups of at most `size` bytes."""
    group: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if group and sum(map(nbytes, group.values())) + nbytes(shape) > size:
            yield group
            group = {}
        group[name] = shape
    yield group


def make_source(folder: Path, options: argparse.Namespace) -> list[str]:
    """Makes the model, all holes, and returns arguments for `arcflow convert` besides `--source` and `--out`."""
    index = read_json(options.model / "model_index.json")
    pipeline = index["_class_name"]
    changes = dict(option.split("=", 1) for option in options.set)
    arguments = []
    for component, network in families.of_pipeline(pipeline, pipeline).networks.items():
        config = read_json(options.model / component / "config.json")
        for key in list(changes):
            if key.startswith(f"{component}."):
                config[key.removeprefix(f"{component}.")] = json.loads(changes.pop(key))
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(config))
        original = options.original and network.original is not None
        shapes = source_shapes(network, config, original)
        if original:
            file = folder / f"{component}.safetensors"
            make_file(file, shapes)
            arguments += [f"--{component}", str(file)]
            continue
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        weight_map = {}
        for number, shard in enumerate(shards(shapes, int(options.shard_gb * 1e9)), 1):
            file = folder / component / f"{stem}-{number:05d}.safetensors"
            make_file(file, shard)
            weight_map |= dict.fromkeys(shard, file.name)
        (folder / component / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if changes:
        sys.exit(
            f"{', '.join(changes)}: the components are {', '.join(families.of_pipeline(pipeline, pipeline).networks)}"
        )
    for name in families.of_pipeline(pipeline, pipeline).tokenizers:
        (folder / name).mkdir()
        (folder / name / "tokenizer_config.json").write_text("{}")  # a bucket has no empty folders
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    return arguments


def convert(arguments: Sequence[str], parent: Connection, as_it_goes: bool) -> None:
    """Runs `arcflow convert` in a child process. With `as_it_goes` it tells the parent which tensor it reads next. At
    the end it sends its resource usage."""
    read = FileTensor.__array__

    def announced(tensor: FileTensor, dtype: Any = None, copy: Any = None) -> np.ndarray:
        parent.send(tensor)
        parent.recv()  # the tensor has been written
        return read(tensor, dtype, copy)

    if as_it_goes:
        FileTensor.__array__ = announced
    try:
        cli.main(["convert", *arguments])
    finally:
        parent.send(resource.getrusage(resource.RUSAGE_SELF))


def convert_apart(
    arguments: Sequence[str], values: Values, as_it_goes: bool
) -> tuple[float, float, resource.struct_rusage]:
    """Runs `arcflow convert` in a process of its own.

    Returns its seconds without those for writing the source, the seconds for that, and its resource usage.
    """
    context = multiprocessing.get_context("spawn")
    connection, childs = context.Pipe()
    process = context.Process(target=convert, args=(arguments, childs, as_it_goes))
    start = time.perf_counter()
    process.start()
    waiting, usage = provide(connection, values)
    process.join()
    seconds = time.perf_counter() - start - waiting
    if process.exitcode:
        sys.exit(f"arcflow convert failed with status {process.exitcode}")
    return seconds, waiting, usage


def give_back(tensor: FileTensor) -> None:
    """Turns a tensor into a hole again."""
    place = ["--offset", str(tensor.offset), "--length", str(nbytes(tensor.shape))]
    subprocess.run(["fallocate", "--punch-hole", *place, tensor.path], check=True)


def provide(child: Connection, values: Values) -> tuple[float, resource.struct_rusage]:
    """Writes each tensor that the child will read. Returns the seconds this took, and the child's resource usage."""
    seconds, before = 0.0, None
    while isinstance(message := child.recv(), FileTensor):
        start = time.perf_counter()
        if before is not None:
            give_back(before)
        values.write(message)
        before = message
        seconds += time.perf_counter() - start
        child.send(True)
    return seconds, message


def run(options: argparse.Namespace, url: str | None = None) -> None:
    """Makes the source, converts it, in the bucket `url` if there is one, and prints the cost."""
    source = options.folder / "source"
    out = as_path(f"{url}/converted") if url else options.folder / "converted"
    arguments = ["--source", str(source), "--out", str(out), *make_source(source, options)]
    size, values = sum(sizes_below(source).values()), Values()
    start = time.perf_counter()
    if not options.as_it_goes:
        for path in sorted(source.rglob("*.safetensors")):
            for tensor in read_header(path).values():
                values.write(tensor)
    writing = time.perf_counter() - start

    seconds, waiting, usage = convert_apart(arguments, values, options.as_it_goes)
    print(f"wrote {size / 1e9:.2f} GB in {writing + waiting:.0f} s")
    written = sum(sizes_below(out).values())
    print(f"converted to {written / 1e9:.2f} GB in {seconds:.0f} s, {size / 1e6 / seconds:.0f} MB/s")
    print(f"processor time {usage.ru_utime:.0f} s in user code, {usage.ru_stime:.0f} s in the system")
    print(f"peak resident memory {usage.ru_maxrss * 1024 / 1e9:.2f} GB")  # Linux counts in KiB
    print(f"the process itself wrote {usage.ru_oublock * 512 / 1e9:.2f} GB to disks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with model_index.json and every config.json")
    parser.add_argument("--folder", type=Path, required=True, help="folder for source and result; must not exist yet")
    parser.add_argument("--set", action="append", default=[], help="COMPONENT.KEY=VALUE: change a config.json")
    parser.add_argument("--shard-gb", type=float, default=10, help="size of the largest shard")
    parser.add_argument("--original", action="store_true", help="write the authors' single files, not diffusers'")
    parser.add_argument("--as-it-goes", action="store_true", help="write each tensor just before it is read")
    parser.add_argument("--in-bucket", action="store_true", help="convert to an emulated bucket")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        with bucket("gs", folder=options.folder / "bucket") if options.in_bucket else contextlib.nullcontext() as url:
            run(options, url)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
