"""Gradient accumulation: a batch in micro-batches gives what the whole batch gives, and takes the memory of one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.families.flux import FLUX
from arcflow_jax.flow.distill import Distillation, distil
from arcflow_jax.flow.momentum import Mixture
from arcflow_jax.networks.student import split_model
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.training.plan import step_settings
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.state import OF_GRADIENT, gradient
from tests.helpers import few_steps

B, N = few_steps.BATCH, few_steps.ROWS**2


@functools.cache
def step():
    """The settings of the gradient of a random FLUX with random adapters and CFG; its arguments; and latents."""
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    adapter = dataclasses.replace(few_steps.ADAPTER, dropout=0.0)
    graphdef, base, abstract = split_model(FLUX.student(few_steps.FLUX_CONFIG, adapter, jnp.float32))
    settings = Distillation(states=2, decay=4, teacher_guidance="cfg", data_weight=0.5)
    recipe = Recipe("m", "o", 2.0, prompts="p", images="i", optimizer=few_steps.OPTIMIZER, distillation=settings)
    prompts = few_steps.conditioning(mesh, jnp.float32)
    negative = jax.tree.map(lambda x: x if x is prompts.positions else x[::-1], prompts)
    weights = few_steps.random_weights(base, mesh), few_steps.random_weights(abstract, mesh)
    keywords = {name: x for name, x in step_settings(recipe, graphdef, mesh).items() if name in OF_GRADIENT}
    latents = jax.random.normal(jax.random.key(3), (B, N, few_steps.FLUX_CONFIG.in_channels))
    arguments = (jnp.int32(1), weights[1], weights[0], prompts, jax.random.key(2), negative)  # teacher's share 3/4
    return keywords, arguments, latents


def gradient_of(accumulate: int, *, steady: bool, data: bool):
    """(gradient, log)"""
    keywords, arguments, latents = step()
    return gradient(*arguments, latents if data else None, **keywords | {"steady": steady, "accumulate": accumulate})


def distance(ours: object, theirs: object) -> float:
    """The norm of the difference of two trees, relative to the norm of the second."""
    return float(optax.global_norm(jax.tree.map(jnp.subtract, ours, theirs)) / optax.global_norm(theirs))


@pytest.mark.slow
@pytest.mark.parametrize(("steady", "data"), [(False, True), (True, False)])
def test_micro_batches_give_what_the_batch_gives(steady, data):
    whole, log = gradient_of(1, steady=steady, data=data)
    parts, log_of_parts = gradient_of(4, steady=steady, data=data)
    assert log["teacher_share"] == (0 if steady else 0.75)
    for name in log.keys() - {"velocity_error"}:
        np.testing.assert_allclose(log_of_parts[name], log[name], rtol=1e-4, err_msg=name)
    assert log["velocity_error"].shape == log_of_parts["velocity_error"].shape
    assert distance(parts, whole) < 1e-4
    assert optax.global_norm(whole) > 0


def test_parts_of_a_batch_have_dropout_keys_of_their_own():
    seen = []

    def student(params, x, sigma, dropout_key):
        seen.append(tuple(jax.random.key_data(dropout_key).tolist()))
        return Mixture(x[..., None, :, None] * params, jnp.zeros((*x.shape[:2], 1, 1)), jnp.zeros((*x.shape[:2], 0, 1)))

    x = jnp.ones((2, 3, 4))
    for part in ((0, 1), (0, 2), (1, 2)):
        options = {"settings": Distillation(mode_dropout=0.0), "teacher_share": None, "latents": x, "part": part}
        distil(student, jnp.ones(()), lambda x, sigma: x, x, jax.random.key(0), **options)
    assert len(set(seen)) == 3


@pytest.mark.slow
def test_memory_is_that_of_a_micro_batch():
    keywords, arguments, _ = step()
    temporaries = []
    for parts in (1, 8):
        lowered = gradient.lower(*arguments, **keywords | {"steady": True, "accumulate": parts})
        temporaries.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert temporaries[1] < temporaries[0] / 2


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="batch 16 does not divide into accumulate=3 micro-batches"):
        Recipe("m", "o", 1.0, prompts="p", accumulate=3)
