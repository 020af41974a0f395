"""Topologies by name, as devices that are not attached: `v5p:2x2x1`, `v5p:2x2x1*2`, `h100`, `h100:8`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

import arcflow_jax
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.parallel import offload
from arcflow_jax.parallel.chips import CHIPS, Chip

HOST = 8  # GPUs of a host, where there are more
TPUS, GPUS = ([name for name, chip in CHIPS.items() if bool(chip.gpu) == gpu] for gpu in (False, True))


class HostSharding(NamedSharding):
    """In pinned host memory: `NamedSharding` drops the kind of memory of devices that are not attached."""

    @property
    def memory_kind(self) -> str:
        return offload.HOST


def chip(topology: str) -> Chip:
    """The chip of a topology. Raises UserError if its name is unknown, or what follows it is of another form."""
    name, colon, rest = topology.partition(":")
    if name in TPUS and re.fullmatch(r"[^*]+(\*[1-9]\d{0,4})?", rest):
        return CHIPS[name]
    if name in GPUS and (not colon or gpus(topology)):
        return CHIPS[name]
    raise UserError(
        f"unknown topology {topology!r}: give one of {', '.join(TPUS)} with a shape, such as v6e:2x4, or v6e:2x4*2 for "
        f"two slices, or one of {', '.join(GPUS)} with a number of devices, such as h100:8; more than {HOST} GPUs are "
        f"whole hosts of {HOST}"
    )


def gpus(topology: str) -> int:
    """The number of devices of a topology of GPUs; 0 if it states none that there can be."""
    _, colon, rest = topology.partition(":")
    count = int(rest or not colon) if re.fullmatch(r"\d{0,5}", rest) else 0
    return count if count <= HOST or count % HOST == 0 else 0


def describe(topology: str) -> list[Any]:
    """The devices of a topology. Raises UserError if the compiler does not know it."""
    known, (name, _, slices) = chip(topology), topology.partition("*")
    options: dict[str, Any] = {"platform": "tpu", "num_slices": int(slices or 1)}
    if known.gpu is not None:
        count = gpus(topology)
        hosts = max(1, count // HOST)
        name = name.partition(":")[0]
        options = {
            "platform": "cuda",
            "target_config": target_config(known),
            "topology": f"1x{hosts}x{count // hosts}",
        }
    try:
        return topologies.get_topology_desc(topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the compiler rejects topology {topology!r}: {one_line(error)}") from None


def target_config(chip: Chip) -> str:
    """What XLA has to know of a GPU to compile for it, its GpuTargetConfig as a text-format protocol buffer.

    The limits that are written out hold for all compute capabilities from 8.0.
    """
    gpu, name = chip.gpu, chip.kinds[0]
    major, minor = gpu.capability
    device = {
        "name": f'"{name}"',
        "device_vendor": '"NVIDIA Corporation"',
        "cuda_compute_capability": {"major": major, "minor": minor},
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": int(chip.memory),
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": gpu.l2,
        "shared_memory_per_core": gpu.shared,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": gpu.shared - 2**10,
        "threads_per_core_limit": gpu.threads,
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        **{f"thread_dim_limit_{axis}": size for axis, size in (("x", 1024), ("y", 1024), ("z", 64))},
        **{f"block_dim_limit_{axis}": size for axis, size in (("x", 2**31 - 1), ("y", 65535), ("z", 65535))},
    }
    return text_format(
        {
            "gpu_device_info": device,
            "platform_name": '"CUDA"',
            "device_description_str": f'"{name}"',
            "dnn_version_info": {"major": 9, "minor": 10, "patch": 0},  # the least that knows all of these GPUs
        }
    )


def text_format(fields: dict[str, Any]) -> str:
    """A protocol buffer in text format."""
    parts = (
        f"{name} {{ {text_format(value)} }}" if isinstance(value, dict) else f"{name}: {value}"
        for name, value in fields.items()
    )
    return " ".join(parts)


def environment(topologies: Sequence[str]) -> dict[str, str]:
    """The environment of a process that compiles for these topologies.

    Raises:
      UserError: if a compiler is not installed.
    """
    kinds = {chip(topology).gpu is not None for topology in topologies}
    if False in kinds and importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, the compiler for TPUs, is not installed: pip install libtpu or arcflow_jax[tpu]")
    folders = {
        "PYTHONPATH": [Path(arcflow_jax.__file__).parents[1]],
        "LD_LIBRARY_PATH": cuda_libraries() if True in kinds else [],
    }
    # The compilation cache does not work for devices that are not attached. libtpu ends the process at a flag that
    # only another XLA knows; its own are in LIBTPU_INIT_ARGS
    dropped = {"JAX_COMPILATION_CACHE_DIR", *(["XLA_FLAGS"] if False in kinds else [])}
    return {
        **{name: value for name, value in os.environ.items() if name not in dropped},
        **{name: os.pathsep.join([*map(str, paths), os.environ.get(name, "")]) for name, paths in folders.items()},
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server here
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # nor a driver
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def cuda_libraries() -> list[Path]:
    """The folders of the CUDA libraries among the installed packages. Raises UserError if the compiler is not there."""
    command = f"pip install 'jax[cuda12-local]=={jax.__version__}' nvidia-cudnn-cu12, or arcflow_jax[cuda12-compile]"
    for package in ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{package}, of the compiler for GPUs, is not installed: {command}") from None
        if package.startswith("jax") and version != jax.__version__:
            raise UserError(f"{package} {version} is not of jax's version {jax.__version__}: {command}")
    nvidia = importlib.util.find_spec("nvidia")
    return [lib for folder in nvidia.submodule_search_locations for lib in sorted(Path(folder).glob("*/lib"))]
