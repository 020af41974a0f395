"""Distillation end to end on the bundled teacher: resume, devices, and what a run refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.networks.student import ArcModel
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.loop import train
from tests.helpers.own_json import rewrite
from tests.helpers.tiny_run import PROMPTS, log, losses, recipe


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    return shutil.copytree(tiny_flux, tmp_path_factory.mktemp("model") / "teacher")


@pytest.mark.slow
def test_student_of_legendre_polynomials(model, tmp_path):
    with pytest.raises(UserError, match="mode_dropout has to be 0 with the basis legendre"):
        recipe(model, tmp_path / "run", adapter={"basis": "legendre"})
    changes = {"adapter": {"basis": "legendre"}, "distillation": {"mode_dropout": 0.0}}
    changes["distillation"] |= {"decay": 1, "least_share": 0.25, "cuts": "stratified"}
    run = train(recipe(model, tmp_path / "run", steps=2, **changes))
    assert all(np.isfinite(losses(run)))
    assert [line["teacher_share"] for line in log(run)] == [1, 0.25]  # there is no phase in which it is 0
    pipeline = ArcFlowPipeline.from_pretrained(model, adapter=run)
    assert "proj_out_coefficients" in pipeline.transformer.state["head"]
    latents = pipeline.noise(0, 1, 2, 2), pipeline.encode(PROMPTS[:1], guidance=2.0, rows=2, columns=2)
    assert np.isfinite(pipeline.denoise(*latents, 2)).all()


def test_run_of_other_settings_is_refused(model, tmp_path):
    train(recipe(model, tmp_path / "run", steps=0))
    changed = recipe(model, tmp_path / "run", guidance=9.0)
    with pytest.raises(UserError, match="holds a run of other settings"):
        train(changed)


def test_adapter_refuses_another_base(model, tmp_path):
    run = train(recipe(model, tmp_path / "run", steps=0))
    rewrite(run / "adapter.json", lambda values: values.update(base="0" * 64))
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
