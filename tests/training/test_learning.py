"""A tiny student learns: a minute of training brings its endpoints far closer to the teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax.generate import sample_student, sample_teacher, seeded_noise, teacher_grid
from arcflow_jax.parallel.mesh import state_shardings
from arcflow_jax.training.plan import Plan, initial_state, step_settings
from arcflow_jax.training.state import train_step
from tests.helpers.tiny_run import PROMPTS, recipe

STEPS = 50
TEACHER_STEPS = 32


@pytest.mark.slow
def test_the_endpoint_error_falls(tiny_flux, tmp_path):
    """Mean square of the student's endpoints less the teacher's, on noises that training did not see."""
    settings = {
        "adapter": {"modes": 4, "rank": 8, "dropout": 0.0},
        "distillation": {"decay": 0, "shift": 3.2, "states": 4},  # a decay of 0: one compiled step
        "optimizer": {"learning_rate": 4e-3, "warmup": 0, "decay_steps": STEPS},
        "ema": {"start": 0, "power": 8.0},
    }
    plan = Plan.make(recipe(tiny_flux, tmp_path / "run", **settings))
    encode = plan.directory.family.prompts(plan.directory, "float32", plan.mesh)
    conditioning = encode(PROMPTS * 2, guidance=1.0, rows=2, columns=2)
    base = plan.directory.load("transformer", plan.base, state_shardings(plan.mesh, plan.base))
    key = jax.random.key(0)
    state = initial_state(plan.graphdef, base, plan.adapter, key, plan.mesh, plan.optimizer)

    noise = seeded_noise(7, len(PROMPTS) * 2, 4, plan.directory.config("transformer").in_channels)
    weights = nnx.merge_state(base, state.ema)
    grid = teacher_grid(plan.directory, 4)
    target = sample_teacher(plan.graphdef, weights, noise, conditioning, *grid, steps=TEACHER_STEPS)

    def error(ema: nnx.State) -> float:
        weights, times = nnx.merge_state(base, ema), (jnp.float32(3.2), jnp.float32(1.0))
        endpoints = sample_student(plan.graphdef, weights, noise, conditioning, *times, steps=2)
        return float(np.mean(np.square(endpoints - target)) / np.mean(np.square(target)))

    before = error(state.ema)
    settings = step_settings(plan.recipe, plan.graphdef, plan.mesh)
    with jax.set_mesh(plan.mesh):
        for _ in range(STEPS):
            state, _ = train_step(state, base, conditioning, key, steady=True, **settings)
    assert error(state.ema) < 0.5 * before
