"""Offloaded weights are on the device only while a function uses them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.parallel.offload import Weights

STATE = {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}


def on_device() -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, STATE)


def test_weights_leave_the_device_after_the_function():
    seen = []

    def total(state):
        seen.extend(jax.tree.leaves(state))
        return sum(x.sum() for x in jax.tree.leaves(state))

    weights = Weights(on_device(), offload=True)
    for _ in range(2):
        assert weights.run(total) == 18
    assert len(seen) == 4
    assert all(x.is_deleted() for x in seen)


def test_weights_leave_the_device_if_the_function_raises():
    seen = []

    def fails(state):
        seen.extend(jax.tree.leaves(state))
        raise RuntimeError("no memory")

    weights = Weights(on_device(), offload=True)
    with pytest.raises(RuntimeError, match="no memory"):
        weights.run(fails)
    assert len(seen) == 2
    assert all(x.is_deleted() for x in seen)
    assert weights.run(lambda state: state["bias"].sum()) == 3  # the copy in host memory is still there


def test_weights_that_are_not_offloaded_stay():
    state = on_device()
    Weights(state).run(lambda state: state["bias"].sum())
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
