"""Where arrays live: one mesh, and one table from logical axis names to its axes.

A weight names its dimensions where it is declared (`axes` of a variable, see `layers.py`), an activation where it is
computed (`constrain`); this table is the only place that knows on which mesh axes a name is split. A mesh axis that
does not divide a dimension, or that an earlier dimension of the same array already uses, leaves it whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from arcflow_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # of weights
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "rank": ("fsdp",),
    "vocab": ("tensor",),
    # of activations
    "batch": ("data", "fsdp"),  # both kinds of data parallelism split the batch
    "tokens": ("sequence",),
    # While tokens attend to one another, a device has all of them and its share of the heads (arXiv 2309.14509)
    "attending_heads": ("tensor", "sequence"),
}


def make_mesh(sizes: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES` over all devices; one size may be -1, and takes what the others leave.

    Raises:
      UserError: sizes that do not multiply to the number of devices, or that split over several slices of TPUs
        something else than the data.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(sizes)
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(1, len(devices) // math.prod(size for size in sizes if size != -1))
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        shape = " × ".join(f"{name} {size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"mesh {shape} does not have the size of {len(devices)} devices")
    return Mesh(arrange(sizes, devices), MESH_AXES)


def arrange(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the shape of a mesh, neighbours of which are neighbours in the TPUs' network.

    Raises:
      UserError: of several slices, whose network between them is slow, if `data` alone cannot be split over them.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise UserError(
            f"data {sizes[0]} of the mesh is not a multiple of the {slices} slices, which split nothing else"
        )
    within = (sizes[0] // slices, *sizes[1:])
    between = (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def mesh_sizes(text: str) -> tuple[int, ...]:
    """The sizes of `MESH_AXES` that e.g. "tensor=4,sequence=2" names; those that it does not are 1.

    Raises:
      UserError: on anything else.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise UserError(f"mesh {text!r}: {part!r} is not one of {', '.join(MESH_AXES)}, then =, then a size")
        sizes[name] = int(size)
    return tuple(sizes.values())


def parse_mesh(text: str) -> Mesh:
    """The mesh for sampling that e.g. "tensor=4,sequence=2" names; "" is the mesh of one device.

    It takes as many devices as it needs, the first ones; with one size of -1, all that there are.

    Raises:
      UserError: on what is not a mesh, or one of more devices than there are.
    """
    sizes = mesh_sizes(text)
    devices = jax.devices()
    wanted = math.prod(sizes)
    return make_mesh(sizes, devices[:wanted] if 0 < wanted < len(devices) else devices)


def partition_spec(mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """How an array is split. `axes` names the trailing dimensions; leading ones (stacked layers) stay whole."""
    split: list[tuple[str, ...]] = [()] * (len(shape) - len(axes))
    for axis, size in zip(axes, shape[len(split) :], strict=True):
        names: tuple[str, ...] = ()
        for name in LOGICAL_AXES.get(axis or "", ()):
            free = not any(name in used for used in split)
            if free and size % math.prod(mesh.shape[each] for each in (*names, name)) == 0:
                names = (*names, name)
        split.append(names)
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in split))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of every variable of a (possibly abstract) state, as a state of the same structure.

    A tree may hold other things beside its variables, as that of an optimizer does its counters: they are replicated.
    """

    def of(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return replicated(mesh)
        spec = partition_spec(mesh, variable.axes, variable.shape)
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def sharded(mesh: Mesh, abstract: Any) -> Any:
    """An abstract state whose shapes carry their shardings: what a checkpoint is to be restored into."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        state_shardings(mesh, abstract),
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """An activation of a jitted function, split over the mesh that `jax.set_mesh` has set.

    Only sequence parallelism needs it, and without it, or without a mesh, x is left alone: on the other axes XLA
    follows weights and batch by itself. (When it is told as well, XLA of jax 0.10.2 on CPUs mixes up the examples of
    a batch over data = 2, fsdp = 2 and tensor = 2.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["sequence"] == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Leading dimension split over the data axes."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_AXES["batch"]))
