"""The pipeline on the bundled teacher: batches, sizes, settings, and the number of compilations."""

# B images, N tokens, C latent channels

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import generate, loaded_model
from arcflow_jax.errors import UserError
from arcflow_jax.families import latents, text
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.sampling_settings import resolve_settings
from tests.helpers.pixels import assert_same_images, pixels
from tests.helpers.random_student import write_adapter

PROMPTS = ["a red circle", "a large green ring", "a blue square on the left"]
SIZE = {"height": 32, "width": 64}
OF_ITS_OWN = ("prompt", "image")  # what an image does not share with others of the same settings


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    return shutil.copytree(tiny_flux, tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture(scope="module")
def student(model) -> Path:
    return write_adapter(model, model.with_name("student"), seed=0)


@pytest.fixture(scope="module")
def pipe(model, student) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(model, student)


def compiled() -> dict[str, int]:
    """How many programs of each kind have been compiled."""
    functions = (generate.sample_student, generate.sample_teacher, generate.decode_latents, text.apply_encoder)
    return {function.__name__: function._cache_size() for function in functions}


def test_batch_size_changes_nothing_but_rounding(pipe):
    size = {"height": 48, "width": 80}  # no other test has run programs of this size
    one_by_one = pipe(PROMPTS, seed=3, **size).images
    before = compiled()
    filled_up = pipe(PROMPTS, seed=3, batch_size=2, **size).images
    assert_same_images(one_by_one, filled_up)
    assert np.abs(pixels(one_by_one)[0] - pixels(one_by_one)[1]).max() > 20
    after = compiled()
    assert after["sample_student"] == before["sample_student"] + 1  # the last batch is filled up
    assert after["decode_latents"] == before["decode_latents"] + 1

    rows, columns = pipe.grid(**SIZE)
    latents = [pipe.noise(3, count, rows, columns, first) for count, first in ((3, 0), (1, 2), (2, 2))]
    for batch in latents[1:]:
        np.testing.assert_allclose(batch[0], latents[0][2], rtol=1e-6)


def test_images_of_a_prompt(pipe):
    images = pipe(PROMPTS[:2], num_images_per_prompt=2, **SIZE).images
    assert [image.info["prompt"] for image in images] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [image.info["image"] for image in images] == [0, 1, 2, 3]
    assert_same_images(images, pipe([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], **SIZE).images, levels=0)
    rest = list(pipe.stream(PROMPTS[1], num_images_per_prompt=2, first=2, **SIZE))
    assert [image.info for image in rest] == [image.info for image in images[2:]]
    assert_same_images(rest, images[2:], levels=0)
    assert np.abs(pixels(images)[0] - pixels(images)[1]).max() > 20


def test_compiles_once_for_a_shape_and_a_number_of_steps(pipe, model):
    def images(pipe=pipe, prompt=PROMPTS[0], **changes) -> np.ndarray:
        return pixels(pipe(prompt, **{"seed": 0, "guidance_scale": 2.0, **SIZE, **changes}).images)

    first = images()
    before = compiled()
    other = ArcFlowPipeline.from_pretrained(model, write_adapter(model, model.with_name("other"), seed=1))
    changed = {
        "prompt": images(prompt=PROMPTS[1]),
        "seed": images(seed=2**31 - 1),
        "guidance": images(guidance_scale=7.0),
        "final_step_ratio": images(final_step_ratio=0.25),
        "adapter": images(pipe=other),
    }
    assert compiled() == before
    for name, result in changed.items():
        assert np.abs(result - first).max() > 1, name

    seen = [first]
    for i, steps in enumerate((1, 8), start=1):
        seen.append(images(num_inference_steps=steps))
        assert np.abs(seen[i] - seen[i - 1]).max() > 1
        images(num_inference_steps=steps, seed=5)
        assert compiled() == {**before, "sample_student": before["sample_student"] + i}


def test_lora_apart_and_merged_agree(pipe, model, student):
    apart = ArcFlowPipeline.from_pretrained(model, student, merge=False)
    settings = {"seed": 4, "output_type": "latent", **SIZE}
    expected = pipe(PROMPTS[:2], **settings).images
    made = apart(PROMPTS[:2], **settings).images
    assert np.abs(made - expected).max() < 1e-5 * np.abs(expected).max()
    assert (pipe.origin["lora"], apart.origin["lora"]) == ("merged", "apart")
    flat = nnx.to_flat_state(apart.transformer.state)
    apart.transformer.state = nnx.from_flat_state([(path, x * 0 if path[-1] == "b" else x) for path, x in flat])
    bare = apart(PROMPTS[:2], **settings).images
    assert np.abs(bare - expected).max() > 1e-3 * np.abs(expected).max()  # it is the LoRA that is in both


def test_output_types(pipe):
    images = pipe(PROMPTS, batch_size=2, **SIZE).images
    array = pipe(PROMPTS, batch_size=2, output_type="np", **SIZE).images
    assert array.shape == (3, 32, 64, 3)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(np.round(array * 255), pixels(images))
    tokens = pipe(PROMPTS, batch_size=2, output_type="latent", **SIZE).images
    assert tokens.shape == (3, 8, 16)
    np.testing.assert_allclose(pipe.decode(tokens, *pipe.grid(**SIZE)), pixels(images), atol=1)
    with pytest.raises(UserError, match="output_type is 'pt', but has to be 'pil', 'np' or 'latent'"):
        pipe(PROMPTS, output_type="pt")


def test_unknown_arguments(pipe):
    for call in (pipe, pipe.stream, pipe.settings):
        with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
            call(**({} if call == pipe.settings else {"prompt": PROMPTS}), steps=2)


def test_call_and_stream_take_the_same_arguments(pipe):
    """`stream` hands its settings on to `settings`."""
    settings = set(inspect.signature(resolve_settings).parameters) - {"directory", "student"}
    stream = set(inspect.signature(pipe.stream).parameters) - {"settings", "first", "wanted"} | settings
    assert set(inspect.signature(pipe).parameters) == stream | {"output_type"}


def test_given_latents(pipe):
    rows, columns = pipe.grid(**SIZE)
    expected = pipe(PROMPTS[:2], seed=7, **SIZE).images
    packed = pipe.noise(7, 2, rows, columns)
    image = np.asarray(latents.unpack(packed, rows, columns)).transpose(0, 3, 1, 2)
    assert image.shape == (2, 4, 4, 8)
    for given in (np.asarray(packed), image):
        images = pipe(PROMPTS[:2], latents=given, **SIZE).images
        assert_same_images(images, expected)
        assert "seed" not in images[0].info


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            np.zeros((1, 8, 16), np.float32),
            r"latents are \[1, 8, 16\], 2 .* \[2, 8, 16\] or \[2, 4, 4, 8\]",
        ),
        (np.zeros((2, 16, 8, 4), np.float32), r"latents are \[2, 16, 8, 4\]"),
        (np.zeros((2, 4, 8, 16), np.float32), r"latents are \[2, 4, 8, 16\]"),
        (np.zeros((2, 8, 16), np.int32), "latents are of int32"),
        (np.full((2, 8, 16), np.nan, np.float32), "not finite"),
    ],
)
def test_latents_that_do_not_fit(pipe, given, message):
    with pytest.raises(UserError, match=message):
        pipe(PROMPTS[:2], latents=given, **SIZE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"seed": None}, "seed is None, but has to be a whole number"),  # it was taken for 0, and not told
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"final_step_ratio": 0.0}, r"final_step_ratio is 0\.0"),
        ({"width": 40}, "32x40: height and width have to be positive multiples of 16"),
    ],
)
def test_settings_that_do_not_fit(pipe, settings, message):
    with pytest.raises(UserError, match=message):
        pipe.stream(PROMPTS, **{**SIZE, **settings})  # before the first image is asked for


@pytest.mark.parametrize("option", [{"raw": True}, {"merge": False}, {"adapter_scale": 0.5}])
def test_what_concerns_a_student_is_refused_without_one(model, option):
    (name,) = option
    with pytest.raises(UserError, match=f"^{name} is an option of a student: name its adapter, or leave {name} out"):
        ArcFlowPipeline.from_pretrained(model, **option)


def test_a_model_that_does_not_name_a_size(pipe, monkeypatch):
    assert pipe.grid() == (4, 4)
    monkeypatch.delitem(pipe.directory.config_json("vae"), "sample_size")
    assert pipe.grid(**SIZE) == (2, 4)
    with pytest.raises(UserError, match="does not say how large its images are: name height and width"):
        pipe(PROMPTS[0], height=32)


def test_images_know_their_settings(pipe, model, student):
    image = pipe(PROMPTS[0], seed=5, **SIZE).images[0]
    assert image.size == (64, 32)
    settings = dict(image.info)
    assert settings.pop("version").startswith("arcflow_jax ")
    checksum = settings.pop("adapter_checksum")
    other = write_adapter(model, model.with_name("changed"), seed=2)
    assert checksum == ArcFlowPipeline.from_pretrained(model, student).origin["adapter_checksum"]
    assert checksum != ArcFlowPipeline.from_pretrained(model, other).origin["adapter_checksum"]
    assert settings == {
        "prompt": PROMPTS[0],
        "image": 0,
        "seed": 5,
        "steps": 2,
        "guidance": 2.0,
        "final_step_ratio": 1.0,
        "height": 32,
        "width": 64,
        "model": str(model),
        "base": ModelDirectory.open(model).fingerprint,
        "adapter": str(student),
        "weights": "EMA",
        "lora": "merged",
    }
    assert pipe.described(seed=5, **SIZE) == {name: image.info[name] for name in image.info if name not in OF_ITS_OWN}


def test_teacher(model):
    teacher = ArcFlowPipeline.from_pretrained(model)
    image = teacher(PROMPTS[0], num_inference_steps=3, **SIZE).images[0]
    assert image.info["steps"] == 3
    assert "final_step_ratio" not in image.info
    with pytest.raises(UserError, match="the teacher has none"):
        teacher(PROMPTS[0], final_step_ratio=0.5)


def test_progress(pipe):
    told = []
    for _ in pipe.stream(PROMPTS[:2], **SIZE, progress=lambda *what: told.append(what)):
        told.append("image")
    assert [what for what in told if what == "image" or what[0] == "writing"] == [
        ("writing", 1),
        "image",
        ("writing", 2),
        "image",
    ]
    assert [what for what, done in told[:3] if done == 0] == ["encoding", "denoising", "decoding"]


@pytest.mark.parametrize("offload", [False, True])
def test_the_next_batch_is_made_while_images_are_written(pipe, monkeypatch, offload):
    """Not with offload, where a network waits until the one before it has left the device."""
    monkeypatch.setattr(pipe, "offload", offload)
    monkeypatch.setattr(loaded_model, "OFFLOADED_BATCHES", 1)
    told = []
    for _ in pipe.stream(PROMPTS, **SIZE, progress=lambda *what: told.append(what)):
        told.append("image")
    order = [what[0] if what[0] == "decoding" else what for what in told if what == "image" or what[0] == "decoding"]
    apart, together = ["decoding", "image"] * 3, ["decoding", "decoding", "image", "decoding", "image", "image"]
    assert order == (apart if offload else together)
    finished = 0
    for what in told:
        finished += what == "image"
        assert what == "image" or what[1] == finished + (what[0] == "writing"), told


def test_seeds_have_64_bits():
    """Small ones are JAX's own, and no two share their noise."""
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    noises = [np.asarray(generate.seeded_noise(seed, 1, 4, 4)) for seed in seeds]
    for i, noise in enumerate(noises):
        assert all(np.any(noise != other) for other in noises[:i])
    for seed in seeds[:3]:
        assert jax.random.key(seed) == generate.random_key(seed)
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=f"seed is {seed}, but has to be a whole number from 0 to {2**64 - 1}"):
            generate.random_key(seed)
