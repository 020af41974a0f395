"""What the checksums of a converted model cost when it is loaded.

    python benchmarks/load_checksums.py [--megabytes 512] [--repeats 9] [--from-disk]

Writes one array, as the converter writes a component, with checksums and without, then restores both by turns: from
the page cache, or from the disk, as the first load after a start of the machine does. Prints the best and the median
time of each, in seconds of wall time and of all cores, and the ratio with / without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from arcflow_jax.arrays import writer
from arcflow_jax.arrays.orbax import handler

LAYER = (1024, 4096)  # 8 MiB in bfloat16


def write(path: Path, layers: int) -> None:
    """An array [L, 1024, 4096] of normal numbers, which compress as weights do."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)
    made = (rng.standard_normal(LAYER, np.float32).astype(dtype) for _ in range(layers))
    writer.write_checkpoint(path, {"a": writer.Stream((layers, *LAYER), dtype, True, lambda: made)})


def restore(path: Path, layers: int) -> tuple[float, float]:
    """Seconds of wall time and of all cores."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"a": jax.ShapeDtypeStruct((layers, *LAYER), ml_dtypes.bfloat16, sharding=device)}
    args = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    wall, cores = time.perf_counter(), time.process_time()
    with ocp.Checkpointer(handler()) as checkpointer:
        jax.block_until_ready(checkpointer.restore(path, args=args))
    return time.perf_counter() - wall, time.process_time() - cores


def forget(path: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for file in filter(Path.is_file, path.rglob("*")):
        with file.open("rb") as open_file:
            os.fsync(open_file.fileno())  # pages that are not written yet stay
            os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--from-disk", action="store_true")
    options = parser.parse_args()
    layers = options.megabytes // 8
    values, zstd = writer.CODECS
    without = zstd | {"configuration": zstd["configuration"] | {"checksum": False}}
    codecs = {"with": writer.CODECS, "without": (values, without)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in codecs}
    with tempfile.TemporaryDirectory() as folder:
        for name, each in codecs.items():
            writer.CODECS = each
            write(Path(folder) / name, layers)
            restore(Path(folder) / name, layers)  # into the file cache
        for _ in range(options.repeats):
            for name in codecs:
                if options.from_disk:
                    forget(Path(folder) / name)
                times[name].append(restore(Path(folder) / name, layers))
    for unit, column in (("wall", 0), ("cores", 1)):
        found = {name: [each[column] for each in values] for name, values in times.items()}
        for how in (min, statistics.median):
            figures = {name: how(values) for name, values in found.items()}
            shown = ", ".join(f"{name} {value:.3f} s" for name, value in figures.items())
            print(f"{unit}, {how.__name__}: {shown}, ratio {figures['with'] / figures['without']:.3f}")


if __name__ == "__main__":
    main()
