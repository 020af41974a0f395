"""The bundled teachers' training."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from arcflow_jax.networks.layers import Linear
from tools.tiny_teacher import common
from tools.tiny_teacher.measure import as_grid, judged


def regression(state: nnx.State, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    x = jax.random.normal(key, (4, 3))
    graphdef, _ = nnx.split(Linear(3, 2, rngs=nnx.Rngs(0)))
    mse = ((nnx.merge(graphdef, state)(x) - x[:, :2]) ** 2).mean()
    return mse, {"mse": mse}


class KilledError(Exception):
    pass


def run(result: Path, killed_at: int | None = None) -> nnx.State:
    reports = []

    def report(state: nnx.State) -> dict[str, float]:
        reports.append(state)
        if len(reports) == killed_at:
            raise KilledError
        return {}

    state = nnx.state(Linear(3, 2, rngs=nnx.Rngs(1)))
    return common.train(regression, state, steps=7, peak=1e-2, every=2, ema=0.5, report=report, result=result)


def test_training_resumes_where_it_was_killed(tmp_path):
    whole = run(tmp_path / "whole.safetensors")
    with pytest.raises(KilledError):
        run(tmp_path / "part.safetensors", killed_at=3)  # after step 6, before its progress is saved
    assert not (tmp_path / "part.safetensors").exists()
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "part.safetensors"), whole)
    whole_file, part_file = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "part"))
    for name, array in whole_file.items():
        np.testing.assert_array_equal(part_file[name], array)
    assert not (tmp_path / "part.progress").exists()


def test_a_finished_training_can_be_run_again(tmp_path):
    """The progress is gone, so a stage that is asked for by name starts anew."""
    first = run(tmp_path / "whole.safetensors")
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "whole.safetensors"), first)


def test_weights_of_half_precision_are_loaded_in_float32(tmp_path):
    module = Linear(3, 2, rngs=nnx.Rngs(1))
    half = jax.tree.map(lambda x: x.astype("bfloat16"), nnx.state(module))
    common.save_state(tmp_path / "half.safetensors", half)
    loaded = common.load_state(tmp_path / "half.safetensors", Linear(3, 2, rngs=nnx.Rngs(2)))
    for ours, rounded in zip(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(half), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, rounded.astype("float32"))


class Reader(nnx.Module):
    """Reads answers that are written in the images."""

    def __call__(self, images: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return images, [images[:, :8], images[:, 8:]]


def test_first_answers_of_the_judge():
    ranked = np.array([[9, 8, 7, 6, 5, 4, 3, 2], [1, 9, 8, 7, 6, 5, 4, 3], [1, 9, 8, 7, 6, 5, 4, 3]], float)
    second = np.array([[0, 1], [1, 0], [1, 0]], float)
    asked = np.array([[0, 1], [5, 1], [0, -1]])  # the best answer, the fifth, the last
    figures = judged(Reader(), jax.numpy.asarray(np.hstack([ranked, second])), asked, ("name", "size"))
    assert figures == {"name": 1 / 3, "size": 0.5, "mean": 2 / 5, "name, top 5": 2 / 3}


def test_grid_goes_row_by_row():
    images = np.linspace(-1, 1, 6)[:, None, None, None] * np.ones((2, 2, 3))
    grid = np.asarray(as_grid(images, 3))
    np.testing.assert_array_equal(grid[::2, ::2, 0], [[0, 51, 102], [153, 204, 255]])
