"""Distillation end to end on the bundled teacher: resume, devices, and what a run refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from arcflow_jax.checkpoints.conversion import convert_model
from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.generate import sample_student
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.files import sealed
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe, read_config

CONFIGS = Path(__file__).parents[2] / "configs"
PROMPTS = ["a red circle", "a green square", "a blue ring on the left", "a large yellow triangle"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return convert_model(ASSETS / "tiny-flux", tmp_path_factory.mktemp("model") / "teacher")


def recipe(model: Path, out: Path, **changes) -> Recipe:
    """The tiny recipe, cut down."""
    config = read_config(str(CONFIGS / "tiny.py"))
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    with config.unlocked():
        config.update(model=str(model), prompts=str(prompts), out=str(out), resolutions=((32, 32),), batch=8, steps=4)
        config.update(log_every=1, save_every=2, mesh=(1, 1, 1, 1), preview_every=0)
        config.adapter.update(modes=3, rank=2, dropout=0.1)
        config.distillation.update(decay=3, states=2)
        config.update(changes)
    return Recipe.from_config(config)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def saved(run: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint."""
    with Checkpoints(run) as checkpoints:
        restored = checkpoints.manager.restore(checkpoints.latest)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(restored)}


def test_student_of_legendre_polynomials(model, tmp_path):
    with pytest.raises(UserError, match="mode_dropout has to be 0 with the basis legendre"):
        recipe(model, tmp_path / "run", adapter={"basis": "legendre"})
    changes = {"adapter": {"basis": "legendre"}, "distillation": {"mode_dropout": 0.0}}
    run = train(recipe(model, tmp_path / "run", steps=2, **changes))
    assert all(np.isfinite(losses(run)))
    pipeline = ArcFlowPipeline.from_pretrained(model, adapter=run)
    assert "proj_out_coefficients" in pipeline.transformer.state["head"]
    latents = pipeline.noise(0, 1, 2, 2), pipeline.encode(PROMPTS[:1], guidance=2.0, rows=2, columns=2)
    assert np.isfinite(pipeline.denoise(*latents, 2)).all()


@pytest.mark.slow
def test_interrupted_run_resumes_bit_for_bit(model, tmp_path):
    straight = train(recipe(model, tmp_path / "straight"))
    train(recipe(model, tmp_path / "resumed", steps=2))
    resumed = train(recipe(model, tmp_path / "resumed"))
    assert losses(straight) == losses(resumed)
    assert all(np.isfinite(losses(straight)))
    one, two = saved(straight), saved(resumed)
    assert one.keys() == two.keys()
    assert sum("ema" in name for name in one) > 10
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)

    # the run can be sampled from, and only with its own base model
    pipeline = ArcFlowPipeline.from_pretrained(model, adapter=straight)
    images = pipeline(PROMPTS[:2], height=32, width=48, seed=3).images
    assert [image.size for image in images] == [(48, 32)] * 2
    compiled = sample_student._cache_size()
    others = pipeline(PROMPTS[2:], height=32, width=48, seed=4, guidance_scale=1.5).images
    assert sample_student._cache_size() == compiled  # nothing about a request is compiled in
    assert np.any(np.asarray(others[0]) != np.asarray(images[0]))


def test_run_of_other_settings_is_refused(model, tmp_path):
    train(recipe(model, tmp_path / "run", steps=0))
    changed = recipe(model, tmp_path / "run", guidance=9.0)
    with pytest.raises(UserError, match="holds a run of other settings"):
        train(changed)


def test_adapter_refuses_another_base(model, tmp_path):
    run = train(recipe(model, tmp_path / "run", steps=0))
    description = json.loads((run / "adapter.json").read_text())
    (run / "adapter.json").write_text(json.dumps(sealed({**description, "base": "0" * 64})))
    with pytest.raises(UserError, match="was trained on base 000000000000…, this model is"):
        ArcFlowPipeline.from_pretrained(model, adapter=run)


def test_mesh_of_another_size_is_refused(model, tmp_path):
    uneven = dataclasses.replace(recipe(model, tmp_path / "run"), mesh=(2, 1, 1, 1))
    with pytest.raises(UserError, match="mesh data=2 needs 2 devices, but 1 device is visible"):
        train(uneven)


@pytest.mark.slow
def test_with_images_and_cfg(model, tmp_path, monkeypatch):
    """From a folder to the log, with every optional loss."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, prompt in enumerate(PROMPTS):
        noise = np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(prompt)
    scales = []

    def watched(self, tokens, sigma, conditioning):
        scales.append(conditioning.scale)
        assert conditioning.negative.text.shape == conditioning.positive.text.shape
        return guided(self, tokens, sigma, conditioning)

    guided = ArcModel._guided_velocity
    monkeypatch.setattr(ArcModel, "_guided_velocity", watched)
    terms = {"data_weight": 0.5, "state_weight": 2.0, "decay": 9}
    guidance = {"teacher_guidance": "cfg", "negative_prompt": "a blue square"}
    settings = {"images": str(folder), "prompts": "", "batch": 4, "steps": 2, "guidance": 3.0}
    run = train(recipe(model, tmp_path / "run", **settings, distillation=terms | guidance))
    assert set(scales) == {3.0}
    first, second = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert np.isfinite([first["loss"], second["loss"]]).all()
    assert len(first["reconstruction"]) == len(first["segment_loss"]) == 1
    assert first["reconstruction"] != second["reconstruction"]


def test_loss_on_images_without_images_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="data_weight weights a loss on real images: name a folder"):
        recipe(model, tmp_path / "run", distillation={"data_weight": 0.5})
