"""Reads every array once, however many processes hold it, and passes it on over the network of the devices.

An array that is not sharded over every axis of its mesh has several replicas there. The processes of one replica read
the array; the replicas take turns. The other processes start from zeros, and receive the array as a sum over replicas.
All processes read small arrays themselves, because compiling a sum and waiting for it would cost more.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, Sharding

SMALL = 1 << 20  # bytes
Read = Callable[[Sequence[Any], Sequence[Any]], Awaitable[Sequence[jax.Array]]]


async def read_once(read: Read, infos: Sequence[Any], wanted: Sequence[ocp.ArrayRestoreArgs]) -> list[jax.Array]:
    """The arrays that `read(infos, wanted)` gives in every process. All processes of their meshes have to call it.

    Args:
      read: Orbax's reading of arrays, in which no process waits for another.
      infos: where each array is stored.
      wanted: each array's shape, dtype and sharding.
    """
    by_size = sorted(range(len(wanted)), key=lambda i: -size(wanted[i]))  # so that each reads about as much
    turns = dict(zip(by_size, range(len(by_size)), strict=True))
    readers = [
        each.sharding if size(each) < SMALL else reader(each.sharding, turns[i]) for i, each in enumerate(wanted)
    ]
    ours = [i for i, at in enumerate(readers) if at.addressable_devices]
    arguments = [copy.copy(wanted[i]) for i in ours]
    for argument, i in zip(arguments, ours, strict=True):
        argument.sharding = readers[i]
    found = dict(zip(ours, await read([infos[i] for i in ours], arguments) if ours else (), strict=True))
    # One after another, in the same order everywhere. A part that was read is given up for the one that is shared
    return [
        found[i] if readers[i] == each.sharding else shared(found.pop(i, None), each) for i, each in enumerate(wanted)
    ]


def size(wanted: ocp.ArrayRestoreArgs) -> int:
    """Bytes of an array."""
    return math.prod(wanted.global_shape) * np.dtype(wanted.dtype).itemsize


def reader(sharding: Sharding, turn: int) -> Sharding:
    """The sharding of the replica whose turn it is to be read; `sharding` itself if no process can be spared."""
    if not (axes := replica_axes(sharding)):
        return sharding
    mesh = sharding.mesh
    sizes = [mesh.shape[name] for name in axes]
    at = dict(zip(axes, np.unravel_index(turn % math.prod(sizes), sizes), strict=True))
    index = tuple(slice(at[name], at[name] + 1) if name in at else slice(None) for name in mesh.axis_names)
    one = NamedSharding(Mesh(mesh.devices[index], mesh.axis_names), sharding.spec)
    return sharding if processes(one) == processes(sharding) else one


def replica_axes(sharding: Sharding) -> tuple[str, ...]:
    """The mesh axes over which an array is not sharded."""
    if not isinstance(sharding, NamedSharding):
        return ()
    used = {name for part in sharding.spec for name in ((part,) if isinstance(part, str) else part or ())}
    return tuple(name for name, size in sharding.mesh.shape.items() if size > 1 and name not in used)


def processes(sharding: Sharding) -> set[int]:
    """The processes that have devices of a sharding."""
    return {device.process_index for device in sharding.device_set}


def shared(found: jax.Array | None, wanted: ocp.ArrayRestoreArgs) -> jax.Array:
    """An array on all its devices, from the replica `found` (None in processes that hold nothing of it)."""
    sharding, shape = wanted.sharding, tuple(wanted.global_shape)
    parts = {part.device: part.data for part in found.addressable_shards} if found is not None else {}
    zeros = np.zeros(sharding.shard_shape(shape), wanted.dtype)
    there = NamedSharding(sharding.mesh, sharding.spec)  # in the devices' memory, wherever it goes then
    each = [parts[device] if device in parts else jax.device_put(zeros, device) for device in there.addressable_devices]
    unequal = jax.make_array_from_single_device_arrays(shape, there, each)
    return jax.device_put(add_up(there)(unequal), sharding)


@functools.cache
def add_up(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Adds the replicas of an array, all but one of which are zero, in place."""

    def add(x: jax.Array) -> jax.Array:
        # As whole numbers: -0.0 + 0.0 would be 0.0, and a sum may change a NaN
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(jax.lax.psum(bits, replica_axes(sharding)), x.dtype)

    spec = sharding.spec
    whole = jax.shard_map(add, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(whole, donate_argnums=0)
