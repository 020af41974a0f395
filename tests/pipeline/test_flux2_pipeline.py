"""FLUX.2 [klein]'s whole path on a tiny folder of random weights: convert, sample, train, export and import."""

# B prompts, N image tokens

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from arcflow_jax.checkpoints.student_formats import export_adapter, import_adapter
from arcflow_jax.errors import UserError
from arcflow_jax.families.flux2 import FAMILY, log_shift
from arcflow_jax.generate import teacher_grid
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.recipe import Recipe
from tests.helpers.pixels import pixels
from tests.helpers.processes import finish, start
from tests.helpers.students import attach_student, predicted, write_run
from tests.helpers.students import student as student_model
from tests.helpers.tiny_flux2 import LENGTH, make_tiny_flux2
from tests.helpers.tiny_run import losses
from tests.helpers.twins import flux2_inputs, flux2_twin_velocity, relative_error
from tests.helpers.whole_path import PROMPTS, assert_same_path, cut_down, whole_path


def recipe(model: Path, out: Path, **changes) -> Recipe:
    return cut_down("flux2:4b", model, out, 16, **changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_tiny_flux2(tmp_path_factory.mktemp("flux2") / "source")


@pytest.fixture(scope="module")
def model(source) -> Path:
    return convert_model(source, source.with_name("converted"))


@pytest.mark.slow
def test_images_are_those_of_diffusers(source, model):
    """Flux2KleinPipeline of diffusers on the same folder and noise: conditioning, and pixels with CFG."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.Flux2KleinPipeline.from_pretrained(source)
    theirs.set_progress_bar_config(disable=True)
    teacher = ArcFlowPipeline.from_pretrained(model)
    conditioning = teacher.encode(PROMPTS, guidance=1.0, rows=4, columns=6)
    with torch.no_grad():
        text, _ = theirs.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
    assert relative_error(conditioning.text, text) < 1e-5

    noise = np.asarray(teacher.noise(0, 2, 4, 6))  # [B, N, 4C]
    as_theirs = torch.from_numpy(noise.reshape(2, 4, 6, -1).transpose(0, 3, 1, 2).copy())
    settings = {"height": 16, "width": 24, "num_inference_steps": 3}
    with torch.no_grad():
        expected = theirs(
            prompt=PROMPTS, latents=as_theirs, max_sequence_length=LENGTH, output_type="np", **settings
        ).images
    ours = teacher(PROMPTS, negative_prompt="", latents=noise, batch_size=2, **settings).images
    np.testing.assert_allclose(pixels(ours), expected * 255, atol=1)
    assert ours[0].info["guidance"] == 4.0
    without = pixels(teacher(PROMPTS, latents=noise, batch_size=2, **settings).images)
    assert np.abs(without - pixels(ours)).max() > 5


@pytest.mark.parametrize(("tokens", "steps"), [(4096, 50), (4096, 200), (1024, 7), (6144, 50)])
def test_shift_of_the_teacher_is_the_pipelines(tokens, steps):
    module = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein")
    assert log_shift(tokens, steps) == pytest.approx(module.compute_empirical_mu(tokens, steps))


def test_shift_of_a_scheduler_that_does_not_depend_on_the_image(source, tmp_path):
    changed = shutil.copytree(source, tmp_path / "source")
    file = changed / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": False}))
    shift, _ = teacher_grid(ModelDirectory.open(convert_model(changed, tmp_path / "model")), 4096, 50)
    assert shift == 3.0


def test_a_distilled_model_is_refused(source, tmp_path):
    distilled = shutil.copytree(source, tmp_path / "source")
    file = distilled / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_distilled": True}))
    with pytest.raises(UserError, match=r"is_distilled is True in model_index.json, only False is supported"):
        convert_model(distilled, tmp_path / "model")


def test_an_export_is_what_diffusers_and_peft_make_of_it(model, source, tmp_path):
    _, _, diffusers = map(pytest.importorskip, ("torch", "peft", "diffusers"))
    settings = recipe(model, tmp_path / "run")
    adapter = settings.adapter.with_targets(FAMILY.lora_targets)
    write_run(tmp_path / "run", model, adapter, settings.distillation, settings.guidance)
    folder = export_adapter(tmp_path / "run", tmp_path / "out", dtype=np.float32)
    twin = diffusers.Flux2Transformer2DModel.from_pretrained(source / "transformer").eval()
    attach_student(twin, folder)
    ours = student_model(model, tmp_path / "run")
    tokens, sigma, c = flux2_inputs(ours.backbone.config, 3, 4, 5)
    with jax.default_matmul_precision("highest"):
        theirs = flux2_twin_velocity(twin, tokens, sigma, c)
        assert relative_error(predicted(ours, tokens, sigma, c), theirs) < 1e-5


@pytest.mark.slow
def test_quantized_and_with_blocks_in_host_memory(source, model, tmp_path):
    """int8 makes about the same image; blocks in host memory make the same."""
    small = convert_model(source, tmp_path / "int8", quantize="int8")
    settings = {"seed": 1, "num_inference_steps": 2, "negative_prompt": ""}
    whole, int8, streamed = (
        pixels(ArcFlowPipeline.from_pretrained(path, offload=offload)(PROMPTS[0], **settings).images)
        for path, offload in ((model, None), (small, None), (model, "blocks"))
    )
    np.testing.assert_allclose(streamed, whole, atol=1)
    assert 0 < np.abs(int8 - whole).mean() < 0.1 * np.abs(whole - whole.mean()).mean() + 1


SIZE = {"height": 16, "width": 24}
ON_EIGHT = """
    import sys
    from pathlib import Path
    from tests.helpers.whole_path import whole_path
    from tests.pipeline.test_flux2_pipeline import SIZE, recipe
    whole_path(recipe, *map(Path, sys.argv[1:]), (2, 2, 2, 1), SIZE)
"""


@pytest.fixture(scope="module")
def one(source) -> Path:
    """What the whole path writes on one device."""
    out = source.with_name("one")
    out.mkdir()
    whole_path(recipe, source, out, (1, 1, 1, 1), SIZE)
    return out


@pytest.mark.slow
def test_student_trains_samples_and_goes_out_and_back(one, tmp_path):
    found = losses(one / "run")
    assert len(found) == 2
    assert np.isfinite(found).all()
    assert min(found) > 0
    config = json.loads((one / "exported" / "config.json").read_text())
    assert (config["_class_name"], config["num_single_layers"]) == ("ArcFlux2Transformer2DModel", 2)
    imported = import_adapter(one / "exported", one / "model", tmp_path / "imported")
    ours, theirs = (
        pixels(ArcFlowPipeline.from_pretrained(one / "model", each)(PROMPTS[0], seed=2, height=16, width=24).images)
        for each in (one / "run", imported)
    )
    np.testing.assert_allclose(ours, theirs, atol=1)
    assert ours.std() > 5


@pytest.mark.slow
def test_whole_path_on_eight_devices_is_that_on_one(source, one, tmp_path):
    finish(start(8, "-c", textwrap.dedent(ON_EIGHT), source, tmp_path))
    assert_same_path(one, tmp_path, 5)
