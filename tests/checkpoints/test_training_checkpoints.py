"""Checkpoints that are killed while being saved, damaged, or find no room."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.errors import UserError
from arcflow_jax.networks.layers import Adapter
from arcflow_jax.training.state import Skipped, TrainState
from tests.helpers.full_disk import disk_for_files_up_to
from tests.helpers.processes import child


def state(step: int, size: int = 4) -> TrainState:
    """A small state that no other step has."""
    adapter = nnx.State({"a": Adapter(jnp.arange(size) + 10.0 * step, axes=(None,))})
    whole = TrainState.create(adapter, optax.adam(0.1))
    return dataclasses.replace(whole, step=jnp.int32(step), skipped=Skipped(jnp.int32(step + 1), jnp.int32(0)))


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    checkpoints.save(int(state.step), state.items())


def restore(checkpoints: Checkpoints, like: TrainState, step: int | None = None) -> TrainState:
    return TrainState.from_items(checkpoints.restore(like.items(), step))


def assert_is(one: TrainState, two: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_what_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
        for step in range(2, 12):
            save(checkpoints, state(step))
    assert sorted(map(int, os.listdir(tmp_path / "checkpoints"))) == [4, 8, 10, 11]


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from tests.checkpoints.test_training_checkpoints import Checkpoints, save, state
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    save(checkpoints, state(1))
def kill(event, arguments):  # all is written, and would now get its name
    if event == "os.rename" and Path(arguments[1]).name == "2":
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    save(checkpoints, state(2))
"""


def test_kill_while_saving_leaves_the_one_before(tmp_path):
    killed = child(KILLED_WHILE_SAVING, tmp_path)
    output, _ = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, output
    assert len(os.listdir(tmp_path / "checkpoints")) == 2  # the remains of the second are there
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_is(restore(checkpoints, state(0)), state(1))
    assert len(os.listdir(tmp_path / "checkpoints")) == 2  # who reads does not clear up
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, state(0)), state(1))
        save(checkpoints, state(2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, state(0)), state(2))


def damage(checkpoint: Path, how: str) -> None:
    """Spoils the largest file, which has the numbers."""
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    if how == "one bit":
        data[len(data) // 2] ^= 1
    file.write_bytes(data if how == "one bit" else data[: len(data) // 2])


@pytest.mark.parametrize("how", ["one bit", "truncated"])
def test_damaged_checkpoint_is_named_and_the_one_before_taken_when_asked(tmp_path, how):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 6):
            save(checkpoints, state(step, size=4000))
    damage(tmp_path / "checkpoints" / "6", how)
    like = state(0, size=4000)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"^checkpoint 6 in .* is damaged; arcflow train --step 3 resumes from"):
            restore(checkpoints, like)
        with pytest.raises(UserError, match="has no checkpoint 5; there are 3, 6"):
            restore(checkpoints, like, 5)
        assert checkpoints.latest == 6
        assert_is(restore(checkpoints, like, 3), state(3, size=4000))
        assert checkpoints.latest == 3
        save(checkpoints, state(6, size=4000))
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, like), state(6, size=4000))


def fill_up(run: Path, size: int, when: str) -> None:
    with Checkpoints(run) as checkpoints:
        save(checkpoints, state(2, size))  # fails in the background
        if when == "at the next save":
            save(checkpoints, state(3, size))
        if when == "when asked":
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)


@pytest.mark.parametrize("when", ["at the next save", "at the end", "when asked"])
def test_full_disk_is_told_in_one_line_and_leaves_older_checkpoints(tmp_path, when, capfd):
    size = 100_000
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state(1, size))
    message = r"^cannot write a checkpoint to .*; checkpoint 1 is intact: [^\n]*$"
    with disk_for_files_up_to(4096), pytest.raises(UserError, match=message):
        fill_up(tmp_path, size, when)
    assert capfd.readouterr().err == ""
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(restore(checkpoints, state(0, size)), state(1, size))


def test_full_disk_is_called_by_its_name(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state(1))
    with Checkpoints(tmp_path) as checkpoints:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(checkpoints.manager, "save", lambda *a, **k: (_ for _ in ()).throw(full))
        with pytest.raises(UserError, match=r"; checkpoint 1 is intact: no space left on the device$"):
            save(checkpoints, state(2))
