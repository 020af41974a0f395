"""A training step in bfloat16 against the same in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.few_steps import few_steps

EPSILON = 2.0**-8  # bfloat16's unit roundoff
ROUNDINGS = 12  # on the way through the network's three blocks, each with a few in a row


@pytest.mark.slow
def test_a_bfloat16_train_step():
    """Rounding moves the student's and the teacher's velocities, and so the root of the loss, by no more than a few
    roundings of the velocity itself."""
    ((exact,), _, _), ((rounded,), state, _) = (
        few_steps((1, 1, 1, 1), dtype, 1) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert exact["loss"] != rounded["loss"]  # it did run in another precision
    # velocity_error is the error's square over the velocity's; so this is a velocity, in the root of the loss's units
    velocity = np.sqrt(exact["segment_loss"] / exact["velocity_error"])
    difference = np.abs(np.sqrt(rounded["segment_loss"]) - np.sqrt(exact["segment_loss"]))
    assert (difference < ROUNDINGS * EPSILON * velocity).all()
    assert np.isfinite(rounded["gradient_norm"])
    trained = jax.tree.leaves((state.adapter, state.ema))
    assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in trained)
