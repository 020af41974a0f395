"""The mesh, and the table that maps logical axis names to mesh axes.

A weight names its dimensions where it is declared (`axes` of a variable, see `networks.layers`), an activation where it
is computed (`constrain`). Only this table knows over which mesh axes a name is sharded. A mesh axis is not used for a
dimension that it does not divide, nor for a second dimension of the same array.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from arcflow_jax import schema
from arcflow_jax.errors import UserError
from arcflow_jax.parallel.chips import chip_of

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
Sizes = tuple[int, int, int, int]  # of `MESH_AXES`

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # Weights
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "rank": ("fsdp",),
    "vocab": ("tensor",),
    # Activations
    "batch": ("data", "fsdp"),  # both kinds of data parallelism shard the batch
    "tokens": ("sequence",),
    # In attention a device has all tokens and its share of the heads (arXiv 2309.14509)
    "attending_heads": ("tensor", "sequence"),
}


def make_mesh(sizes: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES` over all devices. One size may be -1: it takes the devices that are left.

    Raises:
      UserError: if the product of the sizes is not the number of devices, or if `data` does not divide among several
        TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(sizes)
    check_sizes(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // math.prod(size for size in sizes if size != -1))
    if (wanted := math.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh {named(sizes)} needs {count(wanted)}, but {count(len(devices), ' is', ' are')} visible; "
            f"use {fitting(sizes, len(devices))}, or start on {count(wanted)}"
        )
    return Mesh(arrange(sizes, devices), MESH_AXES)


def auto_sizes(
    devices: int,
    batch: int,
    heads: int,
    held: Callable[[Sizes], int],
    *,
    memory: float = math.inf,
    islands: int = 1,
    slices: int = 1,
) -> Sizes:
    """The mesh for training that `mesh="auto"` means.

    data × fsdp is as large as devices and batch allow. Of the rest, `tensor` takes what divides the attention heads,
    and `sequence` what is left. fsdp is as large as possible within an island, so that weights are gathered over the
    fast network only. It crosses islands if a device cannot hold its part otherwise.

    Args:
      devices: the number of devices.
      batch: examples that are computed at once: the batch, or a micro-batch.
      heads: attention heads of the backbone.
      held: bytes of weights, optimizer state and gradients on one device, for a mesh of these sizes.
      memory: bytes that a device may use for these.
      islands: groups of devices with a fast network inside: hosts with NVLink, TPU slices.
      slices: TPU slices, of which `data` has to be a multiple.

    Raises:
      UserError: if the batch does not divide by the slices.
    """
    shards = math.gcd(devices, batch)
    tensor = math.gcd(devices // shards, heads)
    sequence = devices // shards // tensor
    if shards % slices:
        raise UserError(
            f"batch {batch} does not divide by the {slices} TPU slices, over which only data is sharded; "
            f"use batch {next_multiple(batch, slices)}"
        )
    choices = [
        (shards // fsdp, fsdp, tensor, sequence)
        for fsdp in range(shards, 0, -1)
        if shards % fsdp == 0 and (shards // fsdp) % slices == 0
    ]

    def span(sizes: Sizes) -> int:  # islands over which weights are gathered
        group = math.prod(sizes[1:])
        return group // math.gcd(group, max(1, devices // islands))

    holding = [sizes for sizes in choices if held(sizes) <= memory]
    # Of equals, the first: the largest fsdp
    return min(holding, key=lambda sizes: (span(sizes), held(sizes))) if holding else min(choices, key=held)


def next_multiple(number: int, of: int) -> int:
    """The least multiple that is at least `number`."""
    return -(-number // of) * of


def islands(devices: Sequence[jax.Device]) -> int:
    """The number of groups of devices with a fast network inside: TPU slices, or hosts whose GPUs NVLink joins."""
    # On GPUs, XLA numbers the hosts so (in `se_gpu_pjrt_client.cc`); CPUs have no such number
    return len({getattr(device, "slice_index", 0) for device in devices})


def slices(devices: Sequence[jax.Device]) -> int:
    """The number of TPU slices."""
    return islands(devices) if devices[0].platform == "tpu" else 1


def memory_limit() -> float:
    """Bytes that XLA has on the first process's first device, so that all processes plan alike; ∞ if unknown (CPUs)."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    return limit if jax.process_count() == 1 else float(multihost_utils.broadcast_one_to_all(np.float32(limit)))


def check_sizes(sizes: Sequence[int]) -> None:
    """Raises UserError unless the sizes are those of a mesh of some number of devices."""
    if min(sizes) < -1 or 0 in sizes or list(sizes).count(-1) > 1:
        raise UserError(f"mesh {named(sizes)}: a size has to be at least 1, and only one may be -1")


def named(sizes: Sequence[int]) -> str:
    """The sizes of a mesh that are not 1, e.g. "data=2, fsdp=8"."""
    axes = [f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True) if size != 1]
    return ", ".join(axes) or "data=1"


def count(devices: int, one: str = "", many: str = "") -> str:
    return f"1 device{one}" if devices == 1 else f"{devices} devices{many}"


def fitting(sizes: Sequence[int], devices: int) -> str:
    """A change of a mesh that makes it fit: of one size if that suffices, of `fsdp` if there is a choice."""
    for axis in (1, 0, 2, 3):
        others = math.prod(size for other, size in enumerate(sizes) if other != axis)
        if devices % others == 0:
            return f"{MESH_AXES[axis]}={devices // others}"
    return f"fsdp={devices} alone"


def arrange(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the shape of a mesh. Neighbours in the mesh are neighbours in the network of the TPUs.

    Raises:
      UserError: if there are several TPU slices, with a slow network between them, and `data` does not divide among
        them.
    """
    if (number := slices(devices)) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % number:
        raise UserError(
            f"mesh {named(sizes)}: data={sizes[0]} is not a multiple of the {number} TPU slices; "
            f"use a multiple of {number}, because only data is sharded over slices"
        )
    within = (sizes[0] // number, *sizes[1:])
    between = (number, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def check_batch(batch: int, mesh: Mesh, heads: int, micro_batches: int = 1) -> None:
    """Raises UserError, which names a batch and a mesh that fit, unless each device gets as many examples.

    Args:
      batch: examples of a training step.
      heads: attention heads of the backbone.
      micro_batches: parts of the batch that are computed one after another.
    """
    parts = micro_batches * mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % parts == 0:
        return
    fits = auto_sizes(mesh.size, max(1, batch // micro_batches), heads, lambda sizes: 0)
    raise UserError(
        f"batch {batch} does not divide by {'accumulate × ' if micro_batches > 1 else ''}data × fsdp = {parts} of mesh "
        f"{named(mesh.devices.shape)}; use batch {next_multiple(batch, parts)}, or mesh {named(fits)}, as auto does"
    )


def mesh_sizes(text: str) -> tuple[int, ...]:
    """The sizes of `MESH_AXES` from a text such as "tensor=4,sequence=2"; sizes that it does not name are 1.

    Raises:
      UserError: if the text is not of that form.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not re.fullmatch(r"-1|[1-9]\d{0,8}", size):
            where = f"mesh {schema.shown(text)}: {schema.shown(part)}"
            raise UserError(f"{where} is not AXIS=SIZE, where AXIS is one of {', '.join(MESH_AXES)}")
        sizes[name] = int(size)
    return tuple(sizes.values())


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh for sampling from a text such as "tensor=4,sequence=2"; "" is a mesh of one device.

    It uses the first of the devices, as many as it needs; with a size of -1 it uses all of them. By default they are
    those of this process.

    Raises:
      UserError: if the text is not a mesh, or needs more devices than there are.
    """
    sizes = mesh_sizes(text)
    devices = jax.local_devices() if devices is None else devices
    wanted = math.prod(sizes)
    return make_mesh(sizes, devices[:wanted] if 0 < wanted < len(devices) else devices)


def partition_spec(mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """How an array is sharded. `axes` names its trailing dimensions; leading ones (stacked layers) are not sharded."""
    spec: list[tuple[str, ...]] = [()] * (len(shape) - len(axes))
    for axis, size in zip(axes, shape[len(spec) :], strict=True):
        names: tuple[str, ...] = ()
        for name in LOGICAL_AXES.get(axis or "", ()):
            free = not any(name in used for used in spec)
            if free and size % math.prod(mesh.shape[each] for each in (*names, name)) == 0:
                names = (*names, name)
        spec.append(names)
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in spec))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of every variable of a (possibly abstract) state, as a state of the same structure.

    Leaves that are not variables, such as the counters of an optimizer, are replicated.
    """

    def sharding(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return replicated(mesh)
        spec = partition_spec(mesh, variable.axes, variable.shape)
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(sharding, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def sharded(mesh: Mesh, abstract: Any) -> Any:
    """An abstract state with shardings, into which a checkpoint can be restored."""
    return with_shardings(abstract, state_shardings(mesh, abstract))


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """An abstract state with these shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
    )


def platform(mesh: AbstractMesh) -> str:
    """The platform that a program is compiled for, which this machine may not have: "cpu", "gpu" or "tpu".

    It is that of the mesh's devices; JAX's default, if the mesh is abstract or empty.
    """
    device = mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def cuda_capability(mesh: AbstractMesh) -> tuple[int, int] | None:
    """The compute capability of the NVIDIA GPUs that a program is compiled for, see `platform`; None for other devices.

    Of GPUs that this machine does not have, it is that of the table in `chips`.
    """
    kind = None if mesh.abstract_device is None else mesh.abstract_device.device_kind
    for device in jax.devices():
        if kind in (None, device.device_kind):
            return capability_of(device)
    chip = chip_of(kind)
    return chip.gpu.capability if chip and chip.gpu else None


def capability_of(device: jax.Device) -> tuple[int, int] | None:
    """The CUDA compute capability of a device; None if it is no NVIDIA GPU. AMD's have a name, such as gfx942."""
    match = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(match[1]), int(match[2])) if match else None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """An activation of a jitted function, sharded over the mesh that `jax.set_mesh` has set.

    Without a mesh, x is returned as it is. Left to itself, XLA shards activations by features where the weights are,
    and moves them again and again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    # The exception for CPUs: there, with constraints on data = 2, fsdp = 2, tensor = 2, XLA of jax 0.10.2 mixes up the
    # examples of a batch. Only sequence parallelism cannot do without
    if platform(mesh) == "cpu" and mesh.shape["sequence"] == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(mesh, axes, x.shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading dimension is sharded over the data axes."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_AXES["batch"]))


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """The sharding of a batch: split over the data axes, or replicated where the batch is not divisible by them."""
    return replicated(mesh) if rows % (mesh.shape["data"] * mesh.shape["fsdp"]) else batched(mesh)
