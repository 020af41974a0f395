"""A family's whole path on a tiny folder: convert, train with CFG, export, and make images, over a mesh."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from arcflow_jax.checkpoints.student_formats import WEIGHTS, export_adapter
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.parallel.mesh import MESH_AXES
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe, read_config
from tests.helpers.pixels import pixels
from tests.helpers.tiny_run import losses
from tests.helpers.twins import relative_error

PROMPTS = ["a red circle", "a large green ring on the left, with {braces}"]


def cut_down(name: str, model: Path, out: Path, side: int, **changes) -> Recipe:
    """A recipe of that name for a tiny model, which trains two steps with images of `side` pixels."""
    config = read_config(name)
    prompts = out.with_name("prompts.txt")
    prompts.write_text("\n".join(PROMPTS * 2))
    with config.unlocked():
        config.update(model=str(model), prompts=str(prompts), out=str(out), resolutions=((side, side),))
        config.update(batch=2, steps=2, log_every=1, dtype="float32", mesh=(1, 1, 1, 1), preview_every=0)
        config.adapter.update(modes=3, rank=2, alpha=2.0)
        config.distillation.update(decay=4, states=2)  # no second program once the teacher no longer leads
        config.optimizer.update(warmup=0, learning_rate=1e-2)
        config.ema.update(start=0)
        config.update(changes)
    return Recipe.from_config(config)


def whole_path(
    recipe: Callable[..., Recipe], source: Path, out: Path, mesh: tuple[int, ...], size: dict[str, int]
) -> None:
    """Writes out/model, out/run, out/exported and out/images.npy; `recipe` is called with model, run and settings."""
    model = convert_model(source, out / "model")
    run = train(recipe(model, out / "run", mesh=mesh, batch=8))
    exported = export_adapter(run, out / "exported", dtype=np.float32)
    named = ",".join(f"{name}={count}" for name, count in zip(MESH_AXES, mesh, strict=True))
    settings = size | {"seed": 3, "batch_size": 4}
    few = ArcFlowPipeline.from_pretrained(model, exported, mesh=named)(PROMPTS, **settings).images
    many = ArcFlowPipeline.from_pretrained(model, mesh=named)(
        PROMPTS, negative_prompt="", num_inference_steps=3, **settings
    ).images
    np.save(out / "images.npy", pixels([*few, *many]))


def assert_same_path(one: Path, eight: Path, differ: int) -> None:
    """What two meshes have written is the same; and the images differ from one another, by more than `differ`."""
    np.testing.assert_allclose(losses(eight / "run"), losses(one / "run"), rtol=1e-4)
    expected, found = (load_file(each / "exported" / WEIGHTS) for each in (one, eight))
    assert found.keys() == expected.keys()
    for name in found:
        assert relative_error(found[name], expected[name]) < 2e-3, name
    expected, found = (np.load(each / "images.npy") for each in (one, eight))
    np.testing.assert_allclose(found, expected, atol=1)
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(expected, 2)) > differ
