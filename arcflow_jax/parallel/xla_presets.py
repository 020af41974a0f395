"""Sets of XLA flags for training on one kind of accelerator: `arcflow train --xla-preset NAME`.

XLA and libtpu read their flags from the environment, once, when JAX first asks for devices. So this module does not
import JAX. The sets say how communication overlaps with computation; none changes results. They have not been measured
with this library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from arcflow_jax.errors import UserError

# MaxText, benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER: gathers of FSDP's weights overlap with matrix products
# (continuation fusion). MaxText/configs/v5p/64b.sh has the same for v5p
GATHER_WHILE_COMPUTING = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
# Ibid., DATA_PARALLEL_OVERLAP: reductions of gradients over slices
REDUCE_WHILE_COMPUTING = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
# Ibid., DENSE_VMEM_LIMIT_FLAG, which its models for v6e use: larger tiles, because v6e has twice the vector memory
LARGE_TILES = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
# NVIDIA JAX-Toolbox, "Environment Variables" of its JAX image and rosetta/docs/GPU_performance.md, "Pipelined
# comm/compute for FSDP" and "Enable Asynchronous collective communication"
HOPPER = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_enable_highest_priority_async_stream": "true",
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
}
# By preset: the environment variable that carries the flags, and the flags
PRESETS: dict[str, tuple[str, dict[str, str]]] = {
    "v5p": ("LIBTPU_INIT_ARGS", GATHER_WHILE_COMPUTING | REDUCE_WHILE_COMPUTING),
    "v6e": ("LIBTPU_INIT_ARGS", GATHER_WHILE_COMPUTING | REDUCE_WHILE_COMPUTING | LARGE_TILES),
    "h100": ("XLA_FLAGS", HOPPER),
}


def variables(preset: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of a preset, with the flags that `environment` already has; those stay as they are.

    Raises:
      UserError: if there is no such preset.
    """
    if preset not in PRESETS:
        raise UserError(f"no XLA preset is called {preset!r}: known are {', '.join(PRESETS)}")
    variable, flags = PRESETS[preset]
    given = environment.get(variable, "")
    names = set(re.findall(r"--(?:no)?([\w]+)", given))
    added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
    return {variable: " ".join(filter(None, [given, *added]))}
