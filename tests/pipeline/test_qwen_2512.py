"""Qwen-Image-2512: the classes and sizes of Qwen-Image, so that all that holds for the one holds for the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arcflow_jax.compile_report.programs import open_model
from arcflow_jax.generate import teacher_grid
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.files import read_json
from arcflow_jax.training.plan import Plan
from tests.helpers.paths import CONFIGS
from tests.pipeline.test_qwen_pipeline import PROMPTS, pixels, recipe
from tools import make_tiny_qwen as tiny

FOLDER = CONFIGS / "qwen-image-2512"
# Of the published folder
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
# What is smaller than in the published config files; the rest is theirs
SMALL = {
    "transformer": {"in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16}
    | {"num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": [4, 6, 6]},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "vae": {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "sample_size": 64},
}


def test_it_has_the_sizes_of_qwen_image():
    """Its plans, programs and students are those of Qwen-Image."""
    ours, older = open_model(FOLDER), open_model(CONFIGS / "qwen-image")
    assert ours.family is older.family
    for component in ours.networks:
        assert ours.config(component) == older.config(component)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    configs = {component: read_json(FOLDER / component / "config.json") | small for component, small in SMALL.items()}
    for name in ("latents_mean", "latents_std"):
        configs["vae"][name] = configs["vae"][name][:4]
    folder = tmp_path_factory.mktemp("2512")
    with pytest.MonkeyPatch.context() as patch:
        text = configs["text_encoder"]
        patch.setattr(tiny, "CONFIGS", configs | {"text_encoder": text | {"text_config": {}}})
        patch.setattr(tiny, "SCHEDULER", SCHEDULER)
        return convert_model(tiny.make_tiny_qwen(folder / "source"), folder / "model")


def test_it_converts_plans_and_samples(model, tmp_path):
    plan = Plan.make(recipe(model, tmp_path / "run"))
    assert plan.directory.config("transformer").num_layers == SMALL["transformer"]["num_layers"]
    teacher = ArcFlowPipeline.from_pretrained(model)
    settings = {"negative_prompt": "", "num_inference_steps": 2, "height": 32, "width": 64}
    images = pixels(teacher(PROMPTS, batch_size=2, **settings).images)
    assert images.shape == (2, 32, 64, 3)
    assert images.std() > 5
    assert np.abs(images[0] - images[1]).max() > 5
    shift, terminal = teacher_grid(plan.directory, 256)
    assert (shift, terminal) == (pytest.approx(np.exp(0.5)), pytest.approx(0.02))
