"""What the backward pass computes again: same gradients, less arithmetic, more memory; and the choice by memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax.networks.attention import attention_kernel
from arcflow_jax.networks.student import split_model
from arcflow_jax.parallel.chips import CHIPS
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.training import remat
from arcflow_jax.training.plan import Plan
from arcflow_jax.training.remat import kept_bytes, remat_policy, usable
from arcflow_jax.training.state import in_parts, teacher_calls
from arcflow_jax.training.work import flops
from tests.helpers import golden
from tests.helpers.tiny_run import recipe
from tests.helpers.twins import flux_inputs

POLICIES = ("full", "attention", "none")


@pytest.fixture(scope="module")
def parts() -> tuple:
    """Graph definition, base model, adapter and inputs of a small student."""
    model = golden.authors_student(golden.LORA)
    nnx.jit(lambda model: model.initialize_student(jax.random.key(0)))(model)
    return (*split_model(model), flux_inputs(golden.TEACHER))


def gradient(parts: tuple, policy: str):
    graphdef, base, _, inputs = parts

    def loss(adapter):
        curve = nnx.merge(graphdef, base, adapter).student_curve(*inputs, jax.random.key(1), policy)
        return jnp.square(curve.means).mean() + jnp.square(curve.log_momenta).mean()

    return jax.grad(loss)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_policies_differ_in_arithmetic_only(parts, kernel):
    adapter, work, found = parts[2], {}, {}
    with attention_kernel(kernel):
        for policy in POLICIES:
            traced = jax.jit(gradient(parts, policy)).trace(adapter)
            work[policy] = flops(traced.jaxpr.jaxpr)
            found[policy] = traced.lower().compile()(adapter)
    for policy in POLICIES[1:]:
        for ours, theirs in zip(jax.tree.leaves(found[policy]), jax.tree.leaves(found["full"]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6 * np.abs(theirs).max())
    assert work["full"] > work["attention"] > work["none"]


def test_what_is_kept_is_counted(parts):
    """With "none", at least each block's input and what its linear layers and attention gave."""
    graphdef, base, adapter, (tokens, _, conditioning) = parts
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    kept = {policy: kept_bytes(graphdef, base, adapter, conditioning, mesh, policy) for policy in POLICIES}
    assert kept["full"] < kept["attention"] < kept["none"]
    config = nnx.merge(graphdef, base, adapter).backbone.config
    rows = len(tokens) * (tokens.shape[1] + conditioning.text.shape[1])
    inputs = rows * config.width * 4 * (config.num_layers + config.num_single_layers)
    assert kept["attention"] - kept["full"] == pytest.approx(inputs, rel=0.1)  # attention is as large as the input
    assert kept["none"] - kept["attention"] > 7 * inputs  # q, k, v, the MLP's 4 D and its output


def test_the_choice_follows_memory(parts, monkeypatch):
    graphdef, base, adapter, (_, _, conditioning) = parts
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    kept = {policy: kept_bytes(graphdef, base, adapter, conditioning, mesh, policy) for policy in POLICIES}
    held = 10**6

    def chosen(room: float, choice: str = "auto") -> str:
        memory = (held + room) / remat.FILLED
        chip = dataclasses.replace(CHIPS["v5p"], memory=memory * (1 + 1e-9))
        monkeypatch.setattr(remat, "chip_of", lambda kind: chip)
        return remat_policy(choice, graphdef, base, adapter, conditioning, mesh, held)

    assert chosen(kept["none"]) == "none"
    assert chosen(kept["none"] - 10) == chosen(kept["attention"]) == "attention"
    assert chosen(kept["attention"] - 10) == "full"
    assert chosen(0, "none") == "none"
    monkeypatch.setattr(remat, "chip_of", lambda kind: None)  # a device that nobody knows
    assert remat_policy("auto", graphdef, base, adapter, conditioning, mesh, held) == "full"


def test_of_a_gpu_jax_uses_a_part(monkeypatch):
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")  # JAX's former name, and its newer one
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert usable(CHIPS["h100"]) == 0.75 * CHIPS["h100"].memory
    for name, share in zip(names, (0.9, 0.8), strict=True):
        with monkeypatch.context() as patched:
            patched.setenv(name, str(share))
            assert usable(CHIPS["h100"]) == share * CHIPS["h100"].memory
    assert usable(CHIPS["v5p"]) == CHIPS["v5p"].memory


def test_the_recipe_decides(tiny_flux, tmp_path):
    assert Plan.make(recipe(tiny_flux, tmp_path / "run")).remat == "full"  # on a CPU
    assert Plan.make(recipe(tiny_flux, tmp_path / "run", remat="none")).remat == "none"


@pytest.mark.parametrize(("states", "examples", "calls"), [(4, 1, 1), (4, 2, 2), (4, 3, 2), (4, 16, 4), (3, 2, 1)])
def test_the_teacher_takes_as_many_states_as_there_are_examples(states, examples, calls):
    assert teacher_calls(states, examples) == calls


def test_parts_keep_the_rows_of_an_example_together():
    batch, states = 3, 4
    x = jnp.arange(batch * states * 2.0).reshape(batch * states, 2)
    of_example = jnp.repeat(jnp.arange(float(batch)), states)

    def call(x, example):
        conditioning = jnp.repeat(jnp.arange(float(batch)), len(x) // batch)
        return x + 10 * conditioning[:, None] + 100 * (conditioning == example)[:, None]

    for parts in (1, 2, 4):
        np.testing.assert_array_equal(in_parts(call, parts, batch, x, of_example), call(x, of_example))
