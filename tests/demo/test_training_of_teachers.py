"""The bundled teachers' training."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from arcflow_jax.networks.layers import Linear
from tools.make_tiny_qwen import CONFIGS
from tools.tiny_teacher import common, qwen, vae
from tools.tiny_teacher.measure import as_grid, judged
from tools.tiny_teacher.shapes import SHAPES
from tools.tiny_teacher.teacher import VAERound


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


def test_one_teachers_sizes_are_not_anothers(tmp_path, monkeypatch):
    """The bundled Qwen-Image begins with the config of the random one, which stays as it is."""
    before = copy.deepcopy(CONFIGS)

    def killed(*_: object, **__: object) -> None:
        raise KilledError

    monkeypatch.setattr(qwen.text, "train_encoder", killed)
    with pytest.raises(KilledError):
        qwen.make_text(tmp_path)
    assert before == CONFIGS


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


def test_rounds_start_from_the_last_one(tmp_path, monkeypatch):
    """A finished round is not run again; the next one starts from its weights."""
    config = dataclasses.replace(SHAPES.vae, block_out_channels=(4, 4))
    one = VAERound(steps=1, horizon=1)
    teacher = dataclasses.replace(SHAPES, vae=config, vae_rounds=(one, one, one))
    first = jax.tree.map(lambda x: x + 1, nnx.state(vae.new_vae(teacher)))
    common.save_state(tmp_path / "vae-1.safetensors", first)
    starts = []

    def train(loss: object, state: nnx.State, *, result: Path, **settings: object) -> nnx.State:
        starts.append((result.name, settings["seed"], jax.tree.leaves(state)))
        return jax.tree.map(lambda x: x * 2, state)

    monkeypatch.setattr(vae, "train", train)
    vae.make_vae(tmp_path, teacher)
    assert [start[:2] for start in starts] == [("vae-2.safetensors", 2), ("vae-3.safetensors", 3)]
    for factor, (_, _, leaves) in zip((1, 2), starts, strict=True):
        for leaf, of_first in zip(leaves, jax.tree.leaves(first), strict=True):
            np.testing.assert_array_equal(leaf, factor * of_first)
    made = common.load_state(tmp_path / "vae.safetensors", vae.new_vae(teacher))
    np.testing.assert_array_equal(jax.tree.leaves(nnx.state(made))[0], 4 * jax.tree.leaves(first)[0])
