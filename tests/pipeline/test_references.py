"""Reference images on a tiny FLUX.2 [klein] of random weights: parity with diffusers, sizes, what is refused."""

# B images, H, W size in pixels, N image tokens, R tokens of reference images

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_jax import generate, image_to_image
from arcflow_jax.errors import UserError
from arcflow_jax.families import flux2
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.pipeline import ArcFlowPipeline
from tests.helpers import random_student
from tests.helpers.command_line import assert_refused, run
from tests.helpers.pixels import pixels
from tests.helpers.random_student import write_adapter
from tests.helpers.tiny_flux2 import LENGTH, make_tiny_flux2
from tests.helpers.twins import relative_error

PROMPTS = ["make the ring green", "put the square onto the circle"]
RNG = np.random.default_rng(0)


def photo(height: int, width: int) -> Image.Image:
    """A smooth image, as images are."""
    small = RNG.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


PHOTOS = [photo(66, 71), photo(64, 64), photo(90, 65), photo(64, 64)]
ADAPTER = dataclasses.replace(random_student.ADAPTER, targets=flux2.FAMILY.lora_targets)
SIZE = {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_tiny_flux2(tmp_path_factory.mktemp("references") / "source")


@pytest.fixture(scope="module")
def model(source) -> Path:
    return convert_model(source, source.with_name("model"))


@pytest.fixture(scope="module")
def teacher(model) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def student(model) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(model, write_adapter(model, model.with_name("student"), 0, ADAPTER))


@pytest.mark.slow
def test_latents_are_those_of_diffusers(source, teacher):
    """Flux2KleinPipeline's, with CFG: one image, whose size the images get, and three of different sizes."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.Flux2KleinPipeline.from_pretrained(source)
    theirs.set_progress_bar_config(disable=True)
    made = {}
    for count, size in ((1, {}), (3, SIZE)):
        rows, columns = (size["height"] // 4, size["width"] // 4) if size else (66 // 4, 71 // 4)
        noise = np.asarray(teacher.noise(0, 2, rows, columns))  # [B, N, 4C]
        as_theirs = torch.from_numpy(noise.reshape(2, rows, columns, -1).transpose(0, 3, 1, 2).copy())
        shared = {"prompt": PROMPTS, "num_inference_steps": 2, "output_type": "latent"} | size
        with torch.no_grad():
            latents = theirs(
                image=PHOTOS[:count], latents=as_theirs, max_sequence_length=LENGTH, **shared
            ).images  # [B, C, h, w], which the VAE decodes
            patches = theirs._patchify_latents(latents)
            mean, deviation = theirs.vae.bn.running_mean, torch.sqrt(theirs.vae.bn.running_var + 1e-4)
            patches = (patches - mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
            expected = theirs._pack_latents(patches).numpy()
        made[count] = teacher(image=PHOTOS[:count], latents=noise, negative_prompt="", batch_size=2, **shared).images
        assert relative_error(made[count], expected) < 1e-5
        without = teacher(
            latents=noise, negative_prompt="", batch_size=2, **shared | {"height": 4 * rows, "width": 4 * columns}
        ).images
        assert relative_error(without, expected) > 0.01
    assert made[1].shape != made[3].shape


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (97, 650), (1024, 1024), (1025, 1024), (1500, 2003), (4000, 500)]
)
def test_fitted_as_in_diffusers(height, width):
    processor = pytest.importorskip("diffusers.pipelines.flux2.image_processor")
    theirs = processor.Flux2ImageProcessor(vae_scale_factor=16)
    image = expected = photo(height, width)
    if width * height > 1024**2:
        expected = theirs._resize_to_target_area(image, 1024**2)
    size = {"height": expected.height // 16 * 16, "width": expected.width // 16 * 16}
    expected = theirs.preprocess(expected, resize_mode="crop", **size)[0].numpy().transpose(1, 2, 0)
    ours = np.asarray(flux2.fitted(image, 16), np.float32) / 127.5 - 1
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(63, 200), (64, 513)])
def test_images_that_diffusers_refuses(height, width):
    processor = pytest.importorskip("diffusers.pipelines.flux2.image_processor")
    with pytest.raises(ValueError, match=r"Image too small|Aspect ratio"):
        processor.Flux2ImageProcessor.check_image_input(photo(height, width))
    with pytest.raises(UserError, match=f"a reference image is {height}x{width}, but has to have at least 64 pixels"):
        flux2.fitted(photo(height, width), 16)


def test_positions_of_two_images():
    positions = flux2.reference_positions([(1, 2), (2, 1)])
    np.testing.assert_array_equal(positions, [[10, 0, 0, 0], [10, 0, 1, 0], [20, 0, 0, 0], [20, 1, 0, 0]])


def test_each_image_is_the_same_as_alone(student):
    """A set of reference images for each prompt; one set for all of them."""
    sets = [[PHOTOS[1], np.asarray(PHOTOS[3])], [PHOTOS[3], np.asarray(PHOTOS[1]) / 255.0]]
    settings = {"num_images_per_prompt": 2, "seed": 3, "output_type": "latent", **SIZE}
    made = student(PROMPTS, image=sets, batch_size=2, **settings).images
    alone = student(PROMPTS[0], image=sets[0], batch_size=2, **settings).images
    assert relative_error(alone, made[:2]) < 1e-4
    shared = student(PROMPTS, image=sets[1], batch_size=2, **settings).images
    assert relative_error(shared[2:], made[2:]) < 1e-4
    assert relative_error(shared[:2], made[:2]) > 1e-3
    image = student(PROMPTS[0], image=PHOTOS[0]).images[0]
    assert image.size == (68, 64)  # of the first image, cropped
    assert image.info["references"] == 1


def counts() -> list[int]:
    """How often each program of a student with references is compiled so far."""
    programs = (generate.sample_student, image_to_image.encode_image, generate.decode_latents)
    return [program._cache_size() for program in programs]


def test_compiles_nothing_for_other_images_of_the_same_sizes(student):
    settings = {"output_type": "latent", **SIZE}
    made = student(PROMPTS[0], image=[PHOTOS[1], PHOTOS[3]], **settings).images
    before = counts()
    other = student(PROMPTS[0], image=[PHOTOS[3], PHOTOS[1]], **settings).images
    assert counts() == before
    assert relative_error(other, made) > 1e-3  # the order of the images counts


@pytest.mark.slow
def test_warm_compiles_for_references(capfd, model, student):
    command = ("warm", "--model", model, "--adapter", model.with_name("student"), "--sizes", "64x80")
    first = counts()
    code, stdout, stderr = run(capfd, *command, "--references", 2)
    assert (code, stdout.count("64x80, 1 a batch, 2 steps")) == (0, 1), stderr
    before = counts()
    assert all(a < b for a, b in zip(first, before, strict=True))
    assert student(PROMPTS[0], image=[photo(80, 64), photo(80, 64)]).images[0].size == (64, 80)
    assert counts() == before


def test_warm_refuses_references_that_do_not_fit(capfd, model, tiny_flux, tmp_path):
    command = ("warm", "--teacher", "--references", 5, "--model")
    assert_refused(capfd, tmp_path, *command, model, message="image has 5 reference images, but has to have 1 to 4")
    assert_refused(capfd, tmp_path, *command, tiny_flux, message="is a FluxPipeline, which reads no reference images")


def test_an_image_with_strength_is_one_to_start_from(student):
    """Whose latents need the statistics that the VAE keeps in its decoder."""
    start = student(PROMPTS[0], image=PHOTOS[1], strength=0.01, output_type="latent").images
    clean = student._image_encoder()(np.asarray(PHOTOS[1])[None])
    assert relative_error(start, clean) < 0.1
    referring = student(PROMPTS[0], image=PHOTOS[1], output_type="latent").images
    assert relative_error(referring, clean) > 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": [PHOTOS[1]] * 5}, "image has 5 reference images, but has to have 1 to 4"),
        ({"image": []}, "image has 0 reference images, but has to have 1 to 4"),
        ({"image": [PHOTOS[1:2], PHOTOS[1:2], PHOTOS[1:2]]}, "image has 3 lists of reference images, but 2 prompts"),
        ({"image": [PHOTOS[1:2], PHOTOS[:1]]}, "reference images are of 64x64 for one prompt, of 64x68 for another"),
        ({"image": photo(20, 90)}, "a reference image is 20x90, but has to have at least 64 pixels a side"),
        ({"image": "photo.png"}, r"image is str, but has to be a PIL image or an array \[H, W, 3\]"),
        ({"image": PHOTOS[1], "height": 17}, "image size 17x64: height and width have to be positive multiples of 4"),
        ({"image": PHOTOS[:3], "strength": 0.5}, "image has 3 images, but has to have one, or one for each prompt, 2"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_door(student, arguments, message):
    with pytest.raises(UserError, match=message):
        student.stream(PROMPTS, **arguments)


def test_a_family_without_references(tiny_flux):
    pipe = ArcFlowPipeline.from_pretrained(tiny_flux)
    with pytest.raises(UserError, match="for each prompt, 1; reference images are for models that read them"):
        pipe.stream("a red circle", image=[PHOTOS[1], PHOTOS[3]])


def test_command(capfd, model, student, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        PHOTOS[i % 2].save(file)
    command = ("sample", "--model", model, "--adapter", model.with_name("student"), "--prompt", PROMPTS[0])
    out = tmp_path / "made"
    named = [each for file in files for each in ("--image", file)]
    code, stdout, stderr = run(capfd, *command, *named[:4], "--out", out, "--height", 16, "--width", 24)
    assert code == 0, stderr
    with Image.open(stdout.strip()) as image:
        made = np.asarray(image, int)
        assert image.info["references"] == "2"
    np.testing.assert_allclose(made, pixels(student(PROMPTS[0], image=PHOTOS[:2], **SIZE).images)[0], atol=1)
    refused = (*command, "--out", tmp_path / "none")
    assert_refused(capfd, tmp_path, *refused, *named, message="image has 5 reference images, but has to have 1 to 4")
    assert_refused(capfd, tmp_path, *refused, "--image", tmp_path / "no.png", message="no.png")
    assert_refused(capfd, tmp_path, *refused, *named[:4], "--strength", 0.5, message="image has 2 images")
