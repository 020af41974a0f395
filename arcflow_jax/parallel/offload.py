"""Several networks on one accelerator: the weights of one that is not running can wait in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")
HOST = "pinned_host"  # JAX's name for the host memory that a device copies from at full speed


class Weights:
    """The weights of one or more networks that run together.

    Args:
      state: a pytree of arrays on the device.
      offload: whether they wait in host memory, and are on the device for as long as they are used.
    """

    def __init__(self, state: Any, offload: bool = False):
        self.state = state
        self.shardings = None
        if offload:
            self.shardings = jax.tree.map(lambda x: x.sharding, state)
            # Waited for: until the copy is done the device's own is still there
            self.state = jax.block_until_ready(to_host(state))

    def run(self, function: Callable[[Any], T]) -> T:
        """function(weights); if they are offloaded, waits for the result and takes them off the device again."""
        if self.shardings is None:
            return function(self.state)
        state = jax.device_put(self.state, self.shardings)
        result = jax.block_until_ready(function(state))
        for array in jax.tree.leaves(state):
            array.delete()
        return result


def to_host(state: Any) -> Any:
    """A copy in pinned host memory, or, on a backend that has none, in NumPy arrays."""
    if any(HOST in kinds(array) for array in jax.tree.leaves(state)):
        return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), state)
    return jax.device_get(state)


def kinds(array: jax.Array) -> set[str]:
    """The kinds of memory that an array's devices can reach."""
    return {memory.kind for device in array.devices() for memory in device.addressable_memories()}
