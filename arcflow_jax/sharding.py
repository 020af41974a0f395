"""Where arrays live: one mesh, and one table from logical axis names to its axes.

A weight names its dimensions where it is declared (`axes` of a variable, see `layers.py`); this table is the only
place that knows on which mesh axis a name is split. A mesh axis that does not divide a dimension, or that an earlier
dimension of the same array already uses, leaves it whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arcflow_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

LOGICAL_AXES: dict[str, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "rank": "fsdp",
    "vocab": "tensor",
}
BATCH = PartitionSpec(("data", "fsdp"))  # both kinds of data parallelism split the batch


def make_mesh(sizes: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES` over all devices; one size may be -1, and takes what the others leave.

    Raises:
      UserError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(sizes)
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(1, len(devices) // math.prod(size for size in sizes if size != -1))
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        shape = " × ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"mesh {shape} does not have the size of {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def partition_spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """How an array is split. `axes` names the trailing dimensions; leading ones (stacked layers) stay whole."""
    names: list[str | None] = [None] * (len(shape) - len(axes))
    for axis, size in zip(axes, shape[len(names) :], strict=True):
        name = LOGICAL_AXES.get(axis or "")
        free = name is not None and name not in names and size % mesh.shape[name] == 0
        names.append(name if free else None)
    return PartitionSpec(*names)


def state_shardings(mesh: Mesh, state: nnx.State) -> nnx.State:
    """The sharding of every variable of a (possibly abstract) state, as a state of the same structure."""

    def of(variable: nnx.Variable) -> nnx.Variable:
        spec = partition_spec(mesh, variable.axes, variable.shape)
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Leading dimension split over the data axes."""
    return NamedSharding(mesh, BATCH)
