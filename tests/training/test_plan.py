"""Every recipe on 1 to 256 devices, planned without an array."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from arcflow_jax.compile_report.programs import open_model
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.networks.student import split_model
from arcflow_jax.parallel.mesh import state_shardings
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.plan import bytes_per_device, held_in_training, training_mesh
from arcflow_jax.training.recipe import Recipe, bundled, read_config
from tests.helpers.paths import ROOT

MODELS = {
    **dict.fromkeys(("flux", "flux:published", "flux:legendre"), ROOT / "configs" / "flux.1-dev"),
    "flux2": ROOT / "configs" / "flux.2-klein-4b",
    "flux2:9b": ROOT / "configs" / "flux.2-klein-9b",
    **dict.fromkeys(("qwen", "qwen:compact", "qwen:legendre"), ROOT / "configs" / "qwen-image"),
    **dict.fromkeys(("tiny", "tiny:linear", "tiny:legendre"), ASSETS / "tiny-flux"),
    "tiny_emoji": ASSETS / "tiny-emoji",
    "tiny_flux2": ASSETS / "tiny-flux2",
    "tiny_qwen": ASSETS / "tiny-qwen",
}
DEVICES = (1, 4, 8, 16, 32, 64, 256)
H100 = 80e9


def test_every_recipe_is_planned_below():
    assert {name.partition(":")[0] for name in MODELS} == set(bundled())


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_has_a_mesh(name):
    """The batch divides, every array is sharded evenly, and eight H100 hold every model."""
    recipe, directory = Recipe.from_config(read_config(name)), open_model(MODELS[name])
    assert recipe.mesh == "auto"
    _, base, adapter = split_model(directory.student(recipe.adapter, recipe.dtype))
    held = held_in_training(base, adapter, make_optimizer(recipe.optimizer, adapter))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    found = []
    for devices in DEVICES:
        mesh = training_mesh(recipe, directory, held, jax.devices() * devices)
        assert mesh.size == devices
        assert recipe.batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
        for x, sharding in zip(jax.tree.leaves(held), jax.tree.leaves(state_shardings(mesh, held)), strict=True):
            sharding.shard_shape(x.shape)  # raises if it does not divide
        found.append(bytes_per_device(mesh, held))
        # Within 1 %, fsdp divides all; tensor divides at least the weights that it is for
        assert whole / devices <= found[-1] < 1.01 * whole / mesh.shape["fsdp"] or whole < 2**30
    assert found == sorted(found, reverse=True)
    assert found[DEVICES.index(8)] < H100 / 8


def test_a_batch_that_does_not_fit_is_refused():
    directory = open_model(ASSETS / "tiny-flux")
    recipe = Recipe("m", "o", 1.0, prompts="p", mesh=(1, -1, 1, 1), batch=12, accumulate=2)
    with pytest.raises(UserError, match="batch 12 does not divide by accumulate × data × fsdp = 8 of mesh fsdp=4; use"):
        training_mesh(recipe, directory, {}, jax.devices() * 4)
    auto = dataclasses.replace(recipe, mesh="auto")
    assert training_mesh(auto, directory, {}, jax.devices() * 4).devices.shape == (1, 2, 2, 1)


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (-1, -1, 1, 1)])
def test_a_mesh_that_no_devices_fit_is_refused_with_the_recipe(sizes):
    with pytest.raises(UserError, match=r"mesh .*: a size has to be at least 1, and only one may be -1"):
        Recipe("m", "o", 1.0, prompts="p", mesh=sizes)
