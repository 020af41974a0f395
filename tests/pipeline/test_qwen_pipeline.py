"""Qwen-Image's whole path on a tiny folder of random weights: convert, condition, sample, train, export and import."""

# B prompts, N image tokens, T text tokens

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from arcflow_jax import generate, loaded_model
from arcflow_jax.checkpoints.student_formats import WEIGHTS, export_adapter, import_adapter
from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.data.tokenizers import load_tokenizer
from arcflow_jax.errors import UserError
from arcflow_jax.families import text
from arcflow_jax.families.latents import unpack
from arcflow_jax.families.qwen_image import FAMILY, QwenPrompts
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.parallel import offload
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.embeddings import CachedPrompts, embed_prompts
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe
from tests.helpers.loras import write_lora
from tests.helpers.pixels import pixels
from tests.helpers.processes import finish, start
from tests.helpers.students import attach_student, metadata, predicted, write_run
from tests.helpers.students import student as student_model
from tests.helpers.tiny_run import losses
from tests.helpers.twins import qwen_inputs, qwen_twin_velocity
from tests.helpers.whole_path import PROMPTS, assert_same_path, cut_down, whole_path
from tools.make_tiny_qwen import make_tiny_qwen

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_tiny_qwen(tmp_path_factory.mktemp("qwen") / "source")


@pytest.fixture(scope="module")
def model(source) -> Path:
    return convert_model(source, source.with_name("converted"))


@pytest.fixture(scope="module")
def teacher(model) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(model)


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


def test_template_before_the_prompt_has_the_tokens_that_are_dropped(source):
    before, _ = QwenPrompts.TEMPLATE.split("{}")
    assert len(load_tokenizer(source / "tokenizer").backend.encode(before).ids) == QwenPrompts.BEFORE


def test_images_are_those_of_diffusers(source, teacher):
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


@pytest.mark.slow
def test_style_lora_is_that_of_diffusers(source, teacher, tmp_path):
    """Loaded, weakened and unloaded in both pipelines, on the same folder and noise."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    theirs = diffusers.QwenImagePipeline.from_pretrained(source)
    theirs.set_progress_bar_config(disable=True)
    parts = ("attn.to_q", "attn.add_v_proj", "attn.to_out.0", "img_mlp.net.2", "txt_mlp.net.0.proj")
    layers = {
        f"transformer.{name}": tuple(module.weight.shape)
        for name, module in theirs.transformer.named_modules()
        if name.endswith(parts)
    }
    assert len(layers) == len(parts) * theirs.transformer.config.num_layers
    file = write_lora(tmp_path / "style.safetensors", rank=5, layers=layers, strength=0.5)
    noise = np.asarray(teacher.noise(0, 2, 4, 6))
    settings = {"height": 64, "width": 96, "num_inference_steps": 3, "output_type": "latent"}

    def latents() -> np.ndarray:
        with torch.no_grad():
            expected = theirs(PROMPTS, latents=torch.from_numpy(noise.copy()), true_cfg_scale=1.0, **settings).images
        made = teacher(PROMPTS, latents=noise, batch_size=2, **settings).images
        assert relative_error(made, expected) < 1e-5
        return made

    plain = latents()
    name = teacher.load_lora_weights(file)
    theirs.load_lora_weights(str(file), adapter_name=name)
    try:
        whole = latents()
        teacher.set_adapters(name, 0.4)
        theirs.set_adapters(name, 0.4)
        weak = latents()
    finally:
        teacher.unload_lora_weights()
    assert all(relative_error(a, b) > 0.01 for a, b in ((plain, whole), (plain, weak), (whole, weak)))
    np.testing.assert_array_equal(teacher(PROMPTS, latents=noise, batch_size=2, **settings).images, plain)


def test_cfg_is_that_of_diffusers(source, teacher):
    """Norm-preserving as its pipeline does it, and plain, by hand from velocities with either prompt."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.QwenImagePipeline.from_pretrained(source)
    theirs.set_progress_bar_config(disable=True)
    noise = np.asarray(teacher.noise(0, 2, 4, 4))
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "true_cfg_scale": 4.0, "output_type": "np"}
    with torch.no_grad():
        expected = theirs(PROMPTS, negative_prompt=["", ""], latents=torch.from_numpy(noise.copy()), **settings).images
    ours = teacher(
        PROMPTS, negative_prompt="", norm_preserving=True, num_inference_steps=2, latents=noise, batch_size=2
    ).images
    np.testing.assert_allclose(pixels(ours), expected * 255, atol=1)
    assert ours[0].info["guidance"] == 4.0

    with pytest.raises(UserError, match="no guidance embedding: give the teacher a negative_prompt"):
        teacher.settings(guidance_scale=4.0)
    plain = pixels(teacher(PROMPTS, negative_prompt="", num_inference_steps=1, latents=noise, batch_size=2).images)
    with_either = [
        teacher.denoise(noise, teacher.encode(prompts, guidance=1.0, rows=4, columns=4), 1)
        for prompts in (PROMPTS, [""] * 2)
    ]
    latents = with_either[1] + 4 * (with_either[0] - with_either[1])  # one Euler step is linear in the velocity
    np.testing.assert_allclose(plain, teacher.decode(latents, 4, 4), atol=1)
    assert np.abs(plain - pixels(teacher(PROMPTS, num_inference_steps=1, latents=noise, batch_size=2).images)).max() > 5


def test_image_of_a_prompt_is_its_own(teacher):
    """Alone, beside a longer prompt, and whatever the size of the batch."""
    together = pixels(teacher(PROMPTS, num_inference_steps=2, seed=1, batch_size=2, height=32, width=64).images)
    for i, prompt in enumerate(PROMPTS):
        noise = np.asarray(teacher.noise(1, 1, 2, 4, first=i))
        alone = pixels(teacher(prompt, num_inference_steps=2, height=32, width=64, latents=noise).images)
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


def recipe(model: Path, out: Path, **changes) -> Recipe:
    """The published recipe, cut down."""
    return cut_down("qwen", model, out, 32, **{"preview_every": 1, **changes})


def longer(model: Path, out: Path, **changes) -> Recipe:
    return recipe(model, out, **{"steps": 6, "preview_every": 0, "distillation": {"decay": 6}} | changes)


@pytest.fixture(scope="module")
def student(model) -> Path:
    """Two steps of the program that the whole path has, too."""
    return train(longer(model, model.with_name("run"), preview_every=1, batch=8, steps=2))


def test_student_trains_and_samples(model, teacher, student):
    log = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2
    assert np.isfinite([line["loss"] for line in log]).all()
    assert min(line["gradient_norm"] for line in log) > 0
    made = pixels(ArcFlowPipeline.from_pretrained(model, student)(PROMPTS[0], seed=2, height=32, width=32).images)
    again = pixels(teacher(PROMPTS[0], seed=2, num_inference_steps=2, height=32, width=32).images)
    assert np.abs(made - again).max() > 1


def test_student_has_its_guidance_built_in(model, student):
    pipeline = ArcFlowPipeline.from_pretrained(model, student)
    with pytest.raises(UserError, match="negative_prompt is for the teacher"):
        pipeline.stream(PROMPTS, negative_prompt="")
    with pytest.raises(UserError, match="no guidance embedding: its student has it built in"):
        pipeline.stream(PROMPTS, guidance_scale=2.0)


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
        pixels(ArcFlowPipeline.from_pretrained(model, run)(PROMPTS, **settings).images) for run in (student, imported)
    )
    np.testing.assert_allclose(ours, theirs, atol=1)


def test_export_is_what_the_authors_have(model, source, tmp_path):
    """Of the published recipe; and diffusers and PEFT make of it the student that we have."""
    _, _, diffusers = map(pytest.importorskip, ("torch", "peft", "diffusers"))
    from safetensors.torch import load_file as load_torch

    settings = recipe(model, tmp_path / "run")
    write_run(
        tmp_path / "run",
        model,
        settings.adapter.with_targets(FAMILY.lora_targets),
        settings.distillation,
        settings.guidance,
    )
    folder = export_adapter(tmp_path / "run", tmp_path / "out", dtype=np.float32)
    assert json.loads(metadata(folder)["policy_config"]) == {"type": "ArcFlow"}
    imported = AdapterDescription.read(import_adapter(folder, model, tmp_path / "imported"))
    assert (imported.guidance, imported.distillation.nfe) == (4.0, 2)

    twin = diffusers.QwenImageTransformer2DModel.from_pretrained(source / "transformer").eval()
    twin.load_state_dict(load_torch(source / "transformer" / WEIGHTS))
    attach_student(twin, folder)
    ours = student_model(model, tmp_path / "run")
    tokens, sigma, c = qwen_inputs(ours.backbone.config, 3, 4, (2, 5))
    with jax.default_matmul_precision("highest"):
        theirs = qwen_twin_velocity(twin, tokens, sigma, c, 3, 4)
        assert relative_error(predicted(ours, tokens, sigma, c), theirs) < 1e-5


def test_embeddings_from_a_cache(model, teacher, tmp_path):
    """With the lengths, and those of the negative prompt."""
    settings = recipe(model, tmp_path / "run")
    cache = embed_prompts(settings, tmp_path / "cache")
    prompts = [*PROMPTS, ""]
    cached = CachedPrompts(cache, teacher.directory, "float32", teacher.mesh, prompts)
    size = {"guidance": 1.0, "rows": 2, "columns": 3}
    ours, fly = cached(prompts, **size), teacher.encode(prompts, **size)
    np.testing.assert_array_equal(ours.lengths, fly.lengths)
    assert len(set(fly.lengths.tolist())) == 3
    np.testing.assert_array_equal(ours.positions, fly.positions)
    np.testing.assert_allclose(ours.text, fly.text, atol=1e-5)


def test_encoder_and_transformer_are_never_on_the_device_together(model, student, monkeypatch):
    """With offload, whose images are the same."""
    straight = ArcFlowPipeline.from_pretrained(model, student)
    lean = ArcFlowPipeline.from_pretrained(model, student, offload=True)
    weights = {"encoder": straight.prompt_encoder.weights, "transformer": straight.transformer}
    shapes = {name: [x.shape for x in jax.tree.leaves(each.state)] for name, each in weights.items()}
    largest = {name: max(each, key=np.prod) for name, each in shapes.items()}

    def held() -> dict[str, int]:  # copies of the largest array
        on_device = [x.shape for x in jax.live_arrays() if x.sharding.memory_kind != offload.HOST]
        return {name: on_device.count(shape) // shapes[name].count(shape) for name, shape in largest.items()}

    before, seen = held(), {}

    def watched(function, name: str):
        def call(*args, **settings):
            seen[name] = held()
            return function(*args, **settings)

        return call

    for name, module in (("apply_encoder", text), ("sample_student", loaded_model)):
        monkeypatch.setattr(module, name, watched(getattr(module, name), name))
    settings = {"seed": 3, "height": 32, "width": 32}
    made = pixels(lean(PROMPTS, **settings).images)
    monkeypatch.undo()
    assert seen == {
        "apply_encoder": before | {"encoder": before["encoder"] + 1},
        "sample_student": before | {"transformer": before["transformer"] + 1},
    }
    np.testing.assert_array_equal(made, pixels(straight(PROMPTS, **settings).images))


def test_base_of_another_kind_is_refused(tiny_flux, student, tmp_path):
    """A student of Qwen-Image on FLUX.1, and the other way round, are told apart by their class."""
    exported = export_adapter(student, tmp_path / "exported")
    with pytest.raises(UserError, match="ArcQwenImageTransformer2DModel, a student of this base is of ArcFlux"):
        import_adapter(exported, tiny_flux, tmp_path / "imported")


def test_compiles_once_for_a_shape(teacher):
    """Whatever the prompt and its length."""

    def count() -> int:
        return generate.sample_teacher._cache_size()

    teacher(PROMPTS[0], num_inference_steps=2, height=32, width=64)
    before = count()
    teacher(PROMPTS[1], num_inference_steps=2, height=32, width=64, seed=5)
    assert count() == before


SIZE = {"height": 32, "width": 64}
ON_EIGHT = """
    import sys
    from pathlib import Path
    from tests.helpers.whole_path import whole_path
    from tests.pipeline.test_qwen_pipeline import SIZE, longer
    whole_path(longer, *map(Path, sys.argv[1:]), (2, 2, 2, 1), SIZE)
"""


@pytest.mark.slow
def test_whole_path_on_eight_devices_is_that_on_one(source, tmp_path):
    one, eight = tmp_path / "one", tmp_path / "eight"
    for out in (one, eight):
        out.mkdir()
    process = start(8, "-c", textwrap.dedent(ON_EIGHT), source, eight)
    whole_path(longer, source, one, (1, 1, 1, 1), SIZE)
    finish(process)
    assert len(losses(one / "run")) == 6
    assert_same_path(one, eight, 10)
