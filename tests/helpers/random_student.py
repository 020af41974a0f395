"""A student of random weights, as a training run leaves it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arcflow_jax.checkpoints.training import AdapterDescription, Checkpoints
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.student import AdapterConfig, split_model
from arcflow_jax.training.state import TrainState

ADAPTER = AdapterConfig(
    modes=3, rank=2, alpha=4.0, dropout=0.0, targets=("transformer_blocks.ff.*", "single_transformer_blocks.proj_out")
)


def write_adapter(model: Path, run: Path, seed: int, config: AdapterConfig = ADAPTER) -> Path:
    """Writes a student of a converted model, by default a FLUX, to the new directory `run`, and returns it."""
    directory = ModelDirectory.open(model)
    _, _, abstract = split_model(directory.student(config, jnp.float32))
    rng = np.random.default_rng(seed)
    adapter = jax.tree.map(lambda x: jnp.asarray(0.05 * rng.standard_normal(x.shape), x.dtype), abstract)
    run.mkdir()
    transformer = directory.description.components["transformer"]
    AdapterDescription(directory.fingerprint, config, Distillation(shift=1.0), 2.0, transformer).write(run)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(0, TrainState.create(adapter, optax.identity()).items())
    return run
