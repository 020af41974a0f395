"""What an accelerator does not use for a while can be kept in host memory: networks, EMA weights, optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")
HOST = "pinned_host"  # JAX's name for host memory from which a device copies at full speed


class Weights:
    """The weights of one or more networks that run together.

    Args:
      state: a pytree of arrays on the device.
      offload: whether to keep them in host memory, and on the device only inside `run`.
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
        state = jax.device_put(self.state, self.shardings)
        try:
            return jax.block_until_ready(function(state))
        finally:
            for array in jax.tree.leaves(state):
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


def on_host(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.sharding.memory_kind == HOST


def memory_kinds(array: jax.Array) -> set[str]:
    """The kinds of memory that the devices of an array can address."""
    return {memory.kind for device in array.devices() for memory in device.addressable_memories()}
