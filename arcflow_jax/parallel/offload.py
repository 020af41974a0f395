"""What an accelerator does not use for a while can be kept in host memory: networks, their blocks, optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from arcflow_jax.parallel.fits import Offload
from arcflow_jax.parallel.mesh import state_shardings

T = TypeVar("T")
HOST = "pinned_host"  # JAX's name for host memory from which a device copies at full speed


class Weights:
    """The weights of one or more networks that run together.

    Args:
      state: a pytree of arrays, each in the memory in which `run` hands it on; that may be the host's.
      offload: whether to keep all of them in host memory otherwise.
    """

    def __init__(self, state: Any, offload: bool = False):
        self.state = state
        self.shardings = None
        if offload:
            self.shardings = jax.tree.map(lambda x: x.sharding, state)
            self.state = to_host(state)

    def run(self, function: Callable[[Any], T]) -> T:
        """function(weights). Offloaded weights leave the device when the result is ready, or if the function raises."""
        if self.shardings is None:
            return function(self.state)
        moved = []

        def move(x: Any, sharding: Any) -> Any:
            if isinstance(x, jax.Array) and x.sharding == sharding:
                return x
            moved.append(jax.device_put(x, sharding))
            return moved[-1]

        try:
            return jax.block_until_ready(function(jax.tree.map(move, self.state, self.shardings)))
        finally:
            for array in moved:
                array.delete()


def to_host(state: Any) -> Any:
    """A copy in pinned host memory; in NumPy arrays on a backend that has none."""
    if any(HOST in memory_kinds(array) for array in jax.tree.leaves(state)):
        moved = jax.device_put(state, jax.tree.map(lambda x: x.sharding.with_memory_kind(HOST), state))
        return jax.block_until_ready(moved)  # because the device keeps its copy until the transfer is done
    return jax.device_get(state)


def to_device(state: Any) -> Any:
    """The inverse of `to_host`, but for NumPy arrays, which stay. Arrays on the device stay there."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")) if on_host(x) else x, state)


def on_host(state: Any) -> bool:
    """Whether arrays, which may be traced, are in host memory. NumPy arrays are not meant."""
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    return any(jax.typeof(x).memory_space == jax.memory.Space.Host for x in arrays)


def running_shardings(mesh: Mesh, state: nnx.State, offload: Offload | None) -> nnx.State:
    """Where the weights of a network are while it runs: on the device, with "blocks" all but its stacked blocks."""
    return block_shardings(mesh, state) if offload == "blocks" else state_shardings(mesh, state)


def in_host_memory(sharding: NamedSharding) -> NamedSharding:
    """The same sharding in host memory."""
    return sharding.with_memory_kind(HOST)


def block_shardings(
    mesh: Mesh, state: nnx.State, host: Callable[[NamedSharding], NamedSharding] = in_host_memory
) -> nnx.State:
    """The shardings of a state whose stacked blocks wait in host memory, from where `layers.scan_blocks` takes them."""

    def stacked(variable: Any) -> bool:
        return len(variable.shape) > len(variable.axes)

    def place(variable: Any, sharding: Any) -> Any:
        return sharding.replace(host(sharding.get_value())) if stacked(variable) else sharding

    return jax.tree.map(place, state, state_shardings(mesh, state), is_leaf=lambda x: isinstance(x, nnx.Variable))


def memory_kinds(array: jax.Array) -> set[str]:
    """The kinds of memory that the devices of an array can address."""
    return {memory.kind for device in array.devices() for memory in device.addressable_memories()}
