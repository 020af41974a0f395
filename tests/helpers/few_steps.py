"""Five training steps of a tiny random FLUX, on all devices there are.

As a script, in a process that a test gives several devices, `few_steps.py MESHES` prints the losses on each of several
meshes.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax.families.flux import FLUX
from arcflow_jax.families.latents import position_ids
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.networks.backbones.flux import FluxConditioning, FluxConfig
from arcflow_jax.networks.student import AdapterConfig, split_model
from arcflow_jax.parallel.mesh import make_mesh, state_shardings
from arcflow_jax.parallel.processes import from_rows, local_rows
from arcflow_jax.training.optimizer import OptimizerConfig, make_optimizer
from arcflow_jax.training.plan import initial_state
from arcflow_jax.training.state import EmaConfig, TrainState, train_step

STEPS, BATCH, ROWS, TEXT = 5, 8, 4, 4
FLUX_CONFIG = FluxConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
)
TARGETS = ("single_transformer_blocks.proj_*", "transformer_blocks.ff.*", "time_text_embed.timestep_embedder.*")
ADAPTER = AdapterConfig(modes=3, rank=8, alpha=8.0, dropout=0.1, targets=TARGETS)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup=0, clip_from=0)


def conditioning(mesh: Mesh, dtype: Any) -> FluxConditioning:
    """Conditioning of a batch, of which this process makes its own rows."""
    rng = np.random.default_rng(0)
    text = rng.standard_normal((BATCH, TEXT, FLUX_CONFIG.joint_attention_dim)).astype(np.float32)
    pooled = rng.standard_normal((BATCH, FLUX_CONFIG.pooled_projection_dim)).astype(np.float32)
    mine = local_rows(mesh, BATCH)
    arrays = [text.astype(dtype), pooled.astype(dtype), np.linspace(1, 4, BATCH, dtype=np.float32)]
    arrays = (from_rows(x[mine], mesh) for x in arrays)
    return FluxConditioning(*arrays, jnp.asarray(position_ids(ROWS, ROWS)))


def random_weights(abstract: nnx.State, mesh: Mesh) -> nnx.State:
    rng = np.random.default_rng(1)

    def draw(x: jax.ShapeDtypeStruct, sharding: jax.NamedSharding) -> jax.Array:
        array = (0.15 * rng.standard_normal(x.shape)).astype(x.dtype)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: array[index])

    return jax.tree.map(draw, abstract, state_shardings(mesh, abstract))


def few_steps(
    sizes: Sequence[int], dtype: Any = jnp.float32, steps: int = STEPS
) -> tuple[list[dict[str, np.ndarray]], TrainState, Mesh]:
    """What each step logs, and the last state, on a mesh of these sizes. Base model and inputs are of `dtype`."""
    mesh = make_mesh(sizes)
    graphdef, abstract_base, abstract = split_model(FLUX.student(FLUX_CONFIG, ADAPTER, dtype))
    optimizer = make_optimizer(OPTIMIZER, abstract)

    base = random_weights(abstract_base, mesh)
    key = jax.random.key(2)
    state = initial_state(graphdef, base, abstract, key, mesh, optimizer)
    step = functools.partial(
        train_step,
        graphdef=graphdef,
        settings=Distillation(states=2, decay=4),
        guidance=1.0,
        optimizer=OPTIMIZER,
        ema=EmaConfig(1, 8.0),
        steady=False,
        mesh=mesh,
    )
    prompts, logs = conditioning(mesh, dtype), []
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, log = step(state, base, prompts, key)
            logs.append(jax.device_get(log))
    return logs, state, mesh


def losses(logs: Sequence[dict[str, np.ndarray]]) -> list[float]:
    return [float(log["loss"]) for log in logs]


def main(meshes: str) -> None:
    found = []
    for sizes in json.loads(meshes):
        logs, state, mesh = few_steps(sizes)
        found.append(losses(logs))
        shardings = jax.tree.leaves(state_shardings(mesh, state))
        if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:  # not all arrays may be too small to be sharded
            assert any(not sharding.is_fully_replicated for sharding in shardings), sizes
        for x, sharding in zip(jax.tree.leaves(state), shardings, strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim), (sizes, x.shape, x.sharding)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
