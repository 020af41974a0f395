"""Sampling from a run that saves: a complete checkpoint is read, and never called damaged."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from arcflow_jax.checkpoints.training import Checkpoints, load_adapter
from arcflow_jax.errors import UserError
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.student import split_model
from arcflow_jax.training.state import TrainState
from tests.helpers.processes import child
from tests.helpers.random_student import ADAPTER, write_adapter

# Saves adapters whose values are all the step, as fast as it can, and keeps the last two
SAVE = """
import sys, time
from pathlib import Path
import jax, jax.numpy as jnp, optax
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.networks.student import split_model
from arcflow_jax.training.state import TrainState
from tests.helpers.random_student import ADAPTER
model, run = map(Path, sys.argv[1:])
_, _, abstract = split_model(ModelDirectory.open(model).student(ADAPTER, jnp.float32))
with Checkpoints(run) as checkpoints:
    for step in range(1, 100_000):
        adapter = jax.tree.map(lambda x: jnp.full(x.shape, step, x.dtype), abstract)
        checkpoints.save(step, TrainState.create(adapter, optax.identity()).items())
        if step == 2:
            print("saving", flush=True)
"""


@pytest.fixture
def run(base, tmp_path) -> Path:
    return write_adapter(base, tmp_path / "run", seed=0)


def values(run: Path, base: Path) -> set[float]:
    """All values of the newest checkpoint's adapter."""
    directory = ModelDirectory.open(base)
    _, checkpoints = load_adapter(run, directory.fingerprint)
    _, _, abstract = split_model(directory.student(ADAPTER, jnp.float32))
    with checkpoints:
        return {float(x) for leaf in jax.tree.leaves(checkpoints.restore_adapter(abstract)) for x in np.ravel(leaf)}


@pytest.mark.parametrize("reads", [8, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.long])])
def test_sampling_beside_a_run_that_saves(base, run, reads):
    process = child(SAVE, base, run)
    try:
        assert process.stdout.readline() == "saving\n"
        seen = []
        for i in range(reads):
            found = values(run, base)
            assert len(found) == 1  # of one checkpoint
            seen.append(found.pop())
            time.sleep(0.02 * (i % 5))  # other lags
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_the_checkpoint_that_was_chosen_is_gone(base, run, monkeypatch):
    """It is deleted between choosing and reading; the newest one is read instead."""
    directory = ModelDirectory.open(base)
    _, _, abstract = split_model(directory.student(ADAPTER, jnp.float32))
    _, checkpoints = load_adapter(run)
    assert checkpoints.latest == 0
    with Checkpoints(run) as writer:
        adapter = jax.tree.map(lambda x: jnp.full(x.shape, 7, x.dtype), abstract)
        writer.save(7, TrainState.create(adapter, optax.identity()).items())
    shutil.rmtree(run / "checkpoints" / "0")
    with checkpoints:
        restored = checkpoints.restore_adapter(abstract)
    assert {float(x) for leaf in jax.tree.leaves(restored) for x in np.ravel(leaf)} == {7.0}


@pytest.mark.parametrize("gone", [FileNotFoundError, NotADirectoryError])
def test_a_checkpoint_goes_while_they_are_listed(run, monkeypatch, gone):
    """Orbax reads the time of each checkpoint as it opens a run; a run that saves deletes one just then."""
    manager, opened = ocp.CheckpointManager, []

    def opens(*args, **kwargs):
        opened.append(1)
        if len(opened) == 1:
            raise gone(str(run / "checkpoints" / "0"))
        return manager(*args, **kwargs)

    monkeypatch.setattr(ocp, "CheckpointManager", opens)
    _, checkpoints = load_adapter(run)
    assert checkpoints.latest == 0


def test_checkpoints_that_cannot_be_listed(run, monkeypatch):
    def opens(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(run / "checkpoints"))

    monkeypatch.setattr(ocp, "CheckpointManager", opens)
    with pytest.raises(UserError, match=r"cannot list the checkpoints of .*/run; checkpoint 0 is intact: Permission"):
        load_adapter(run)


def test_damage_is_still_damage(base, run):
    for file in (run / "checkpoints").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"checkpoint 0 in .* is damaged"):
        values(run, base)


def test_a_run_that_deletes_all_the_time(base, run, monkeypatch):
    _, checkpoints = load_adapter(run)
    steps = iter(range(10**6))
    monkeypatch.setattr(Checkpoints, "latest", property(lambda self: next(steps)))
    with checkpoints, pytest.raises(UserError, match="are replaced faster than they can be read"):
        checkpoints.restore_adapter({})
