"""Where a full-size run's arrays live: nothing large is whole on a device."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from arcflow_jax.compile_report.programs import open_model
from arcflow_jax.families.flux import CLIP, T5
from arcflow_jax.networks.clip import CLIPTextConfig
from arcflow_jax.networks.student import split_model
from arcflow_jax.networks.t5 import T5Config
from arcflow_jax.parallel.mesh import MESH_AXES, state_shardings
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.recipe import Recipe, read_config
from arcflow_jax.training.state import TrainState

ROOT = Path(__file__).parents[2]
MIB = 2**20
T5_XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
CLIP_L = CLIPTextConfig(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)


def flux() -> dict[str, object]:
    """What a run of FLUX.1-dev holds, as shapes."""
    recipe = Recipe.from_config(read_config(str(ROOT / "configs" / "flux.py")))
    student = open_model(ROOT / "configs" / "flux.1-dev").student(recipe.adapter, jnp.bfloat16)
    _, base, adapter = split_model(student)
    optimizer = make_optimizer(recipe.optimizer, adapter)
    state = jax.eval_shape(functools.partial(TrainState.create, optimizer=optimizer), adapter)
    return {"base": base, "adapter": state.adapter, "ema": state.ema, "optimizer": state.opt_state}


def sizes(state: object, mesh: AbstractMesh) -> list[tuple[int, int]]:
    """Bytes of each array, whole and on one device."""

    shardings = jax.tree.leaves(state_shardings(mesh, state))
    return [
        (x.size * x.dtype.itemsize, math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize)
        for x, sharding in zip(jax.tree.leaves(state), shardings, strict=True)
    ]


@pytest.mark.parametrize("mesh", [(1, 4, 1, 1), (16, 4, 1, 1), (4, 8, 1, 1), (1, 2, 2, 1)])
def test_everything_large_is_sharded(mesh):
    """Over fsdp, to a hundredth of the whole; tensor splits most of it further."""
    mesh = AbstractMesh(mesh, MESH_AXES)
    parts = mesh.shape["fsdp"]
    encoders = {
        "T5-XXL": nnx.state(T5.abstract(T5_XXL, jnp.bfloat16)),
        "CLIP-L": nnx.state(CLIP.abstract(CLIP_L, jnp.bfloat16)),
    }
    for name, state in (flux() | encoders).items():
        found = sizes(state, mesh)
        for whole, part in found:
            assert part * parts <= whole or whole < MIB, (name, whole)
        whole, part = (sum(column) for column in zip(*found, strict=True))
        assert part < 1.01 * whole / parts, name
