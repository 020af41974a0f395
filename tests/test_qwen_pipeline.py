"""Qwen-Image's whole path on a tiny folder of random weights: convert, condition, sample, train, export and import."""

# B prompts, N image tokens, T text tokens

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from arcflow_jax.adapter_formats import export_adapter, import_adapter
from arcflow_jax.config import Recipe, read_config
from arcflow_jax.conversion import convert_model
from arcflow_jax.errors import UserError
from arcflow_jax.latents import unpack
from arcflow_jax.model_directory import ModelDirectory
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.prompts import QwenPrompts
from arcflow_jax.tokenizers import load_tokenizer
from arcflow_jax.train import train
from tools.make_tiny_qwen import make_tiny_qwen

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = ["a red circle", "a large green ring on the left, with {braces}"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_tiny_qwen(tmp_path_factory.mktemp("qwen") / "source")


@pytest.fixture(scope="module")
def model(source) -> Path:
    return convert_model(source, source.with_name("converted"))


@pytest.fixture(scope="module")
def teacher(model) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(model)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, np.int32) for image in images])


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


def test_template_before_the_prompt_has_the_tokens_that_are_dropped(source):
    before, _ = QwenPrompts.TEMPLATE.split("{}")
    assert len(load_tokenizer(source / "tokenizer")(before).input_ids) == QwenPrompts.BEFORE


def test_pictures_are_those_of_diffusers(source, teacher):
    """QwenImagePipeline of diffusers on the same folder and noise: conditioning, latents and pixels."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.QwenImagePipeline.from_pretrained(source)
    theirs.set_progress_bar_config(disable=True)
    rows, columns = 4, 6
    conditioning = teacher.encode(PROMPTS, guidance=1.0, rows=rows, columns=columns)
    with torch.no_grad():
        text, mask = theirs.encode_prompt(PROMPTS)
    lengths = mask.sum(1).tolist()
    assert conditioning.lengths.tolist() == lengths
    assert lengths[0] < lengths[1]
    for i, length in enumerate(lengths):
        assert relative_error(conditioning.text[i, :length], text[i, :length]) < 1e-5

    noise = np.asarray(teacher.noise(0, 2, rows, columns))
    latents = teacher.denoise(noise, conditioning, steps=3)
    settings = {"height": 64, "width": 96, "num_inference_steps": 3, "true_cfg_scale": 1.0}
    with torch.no_grad():
        their_latents, their_pixels = (
            theirs(PROMPTS, latents=torch.from_numpy(noise.copy()), output_type=kind, **settings).images
            for kind in ("latent", "np")
        )
    assert relative_error(latents, their_latents) < 1e-5
    assert np.abs(np.asarray(latents) - noise).max() > 0.1
    np.testing.assert_allclose(teacher.decode(latents, rows, columns), their_pixels * 255, atol=1)


def test_true_guidance_is_that_of_diffusers(source, teacher):
    """Rescaled as its pipeline does it, and plain, by hand from velocities with either prompt."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.QwenImagePipeline.from_pretrained(source)
    theirs.set_progress_bar_config(disable=True)
    noise = np.asarray(teacher.noise(0, 2, 4, 4))
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "true_cfg_scale": 4.0, "output_type": "np"}
    with torch.no_grad():
        expected = theirs(PROMPTS, negative_prompt=["", ""], latents=torch.from_numpy(noise.copy()), **settings).images
    ours = teacher(PROMPTS, negative_prompt="", rescaled=True, steps=2, latents=noise, batch_size=2)
    np.testing.assert_allclose(pixels(ours), expected * 255, atol=1)
    assert ours[0].info["guidance"] == 4.0

    plain = pixels(teacher(PROMPTS, negative_prompt="", steps=1, latents=noise, batch_size=2))
    with_either = [
        teacher.denoise(noise, teacher.encode(prompts, guidance=1.0, rows=4, columns=4), 1)
        for prompts in (PROMPTS, [""] * 2)
    ]
    latents = with_either[1] + 4 * (with_either[0] - with_either[1])  # one Euler step is linear in the velocity
    np.testing.assert_allclose(plain, teacher.decode(latents, 4, 4), atol=1)
    assert np.abs(plain - pixels(teacher(PROMPTS, steps=1, latents=noise, batch_size=2))).max() > 5


def test_picture_of_a_prompt_is_its_own(teacher):
    """Alone, beside a longer prompt, and whatever the size of the batch."""
    together = pixels(teacher(PROMPTS, steps=2, seed=1, batch_size=2, height=32, width=64))
    for i, prompt in enumerate(PROMPTS):
        noise = np.asarray(teacher.noise(1, 1, 2, 4, first=i))
        alone = pixels(teacher(prompt, steps=2, height=32, width=64, latents=noise))
        np.testing.assert_allclose(alone[0], together[i], atol=1)
    assert np.abs(together[0] - together[1]).max() > 20


def test_default_size_and_latents(teacher):
    assert teacher.grid() == (4, 4)
    noise = teacher.noise(0, 1, 4, 4)
    assert unpack(noise, 4, 4).shape == (1, 8, 8, 4)


def test_what_is_converted(source, model):
    directory = ModelDirectory.open(model)
    assert list(directory.networks) == ["transformer", "text_encoder", "vae"]
    assert (model / "tokenizer" / "tokenizer.json").is_file()
    assert not (model / "tokenizer_2").exists()
    assert sorted(path.name for path in model.iterdir()) == [
        "model.json",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ]


def test_tokenizer_without_room_for_a_prompt(source, tmp_path):
    model = convert_model(source, tmp_path / "model")
    file = model / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 34}))
    with pytest.raises(UserError, match="model_max_length is 34"):
        ArcFlowPipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def student(model) -> Path:
    """A few iterations of the published recipe, cut down."""
    config = read_config(str(CONFIGS / "qwen.py"))
    prompts = model.with_name("prompts.txt")
    prompts.write_text("\n".join(PROMPTS * 2))
    with config.unlocked():
        config.update(model=str(model), prompts=str(prompts), out=str(model.with_name("run")), resolutions=((32, 32),))
        config.update(batch=2, steps=2, log_every=1, dtype="float32", mesh=(1, 1, 1, 1), preview_every=1)
        config.adapter.update(modes=3, rank=2, alpha=2.0)
        config.distillation.update(decay=4, states=2)  # no second program once the teacher no longer leads
        config.optimizer.update(warmup=1, learning_rate=1e-2)
        config.ema.update(start=0)
    return train(Recipe.of(config))


def test_student_trains_and_samples(model, teacher, student):
    log = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2
    assert np.isfinite([line["loss"] for line in log]).all()
    assert min(line["gradient_norm"] for line in log) > 0
    made = pixels(ArcFlowPipeline.from_pretrained(model, student)(PROMPTS[0], seed=2, height=32, width=32))
    again = pixels(teacher(PROMPTS[0], seed=2, steps=2, height=32, width=32))
    assert np.abs(made - again).max() > 1


def test_student_takes_no_negative_prompt(model, student):
    with pytest.raises(UserError, match="negative_prompt is for the teacher"):
        ArcFlowPipeline.from_pretrained(model, student).stream(PROMPTS, negative_prompt="")


def test_student_goes_out_and_comes_back_in_the_authors_layout(model, student, tmp_path):
    exported = export_adapter(student, tmp_path / "exported", dtype=np.float32)
    config = json.loads((exported / "config.json").read_text())
    assert config["_class_name"] == "ArcQwenImageTransformer2DModel"
    assert {name: config[name] for name in ("num_gaussians", "logweights_channels", "num_layers")} == {
        "num_gaussians": 3,
        "logweights_channels": 4,
        "num_layers": 3,
    }
    imported = import_adapter(exported, model, tmp_path / "imported")
    settings = {"seed": 2, "height": 32, "width": 32}
    ours, theirs = (
        pixels(ArcFlowPipeline.from_pretrained(model, run)(PROMPTS, **settings)) for run in (student, imported)
    )
    np.testing.assert_allclose(ours, theirs, atol=1)


def test_base_of_another_kind_is_refused(student, tmp_path):
    """A student of Qwen-Image on FLUX.1, and the other way round, are told apart by their class."""
    from arcflow_jax.demo import ASSETS

    flux = convert_model(ASSETS / "tiny-flux", tmp_path / "flux")
    exported = export_adapter(student, tmp_path / "exported")
    with pytest.raises(UserError, match="ArcQwenImageTransformer2DModel, a student of this base is of ArcFlux"):
        import_adapter(exported, flux, tmp_path / "imported")


def test_compiles_once_for_a_shape(teacher):
    """Whatever the prompt and its length."""
    from arcflow_jax import pipeline

    def count() -> int:
        return pipeline.sample_teacher._cache_size()

    teacher(PROMPTS[0], steps=2, height=32, width=64)
    before = count()
    teacher(PROMPTS[1], steps=2, height=32, width=64, seed=5)
    assert count() == before
