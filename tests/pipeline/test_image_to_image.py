"""Image to image and inpainting on the bundled teachers: parity with diffusers, what stays, and what is refused."""

# B images, H, W size in pixels, h, w of the latent image, N tokens, C latent channels

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from arcflow_jax import generate, image_to_image
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.flow.schedule import Scheduler, sigma_of
from arcflow_jax.image_to_image import mask_tokens, start_level
from arcflow_jax.pipeline import ArcFlowPipeline
from tests.helpers.command_line import assert_refused, run
from tests.helpers.pixels import pixels
from tests.helpers.random_student import write_adapter

PROMPTS = ["a red circle", "a large green ring", "a blue square on the left"]
SIZE = (32, 64)
RNG = np.random.default_rng(0)
# Smooth, as images are
PHOTOS = [
    np.asarray(Image.fromarray(RNG.integers(0, 256, (4, 8, 3), np.uint8)).resize(SIZE[::-1], Image.Resampling.BICUBIC))
    for _ in PROMPTS
]
MASK = np.zeros(SIZE, bool)
MASK[8:24, 16:48] = True


@pytest.fixture(scope="module")
def student(tiny_flux, tmp_path_factory) -> Path:
    return write_adapter(tiny_flux, tmp_path_factory.mktemp("run") / "student", seed=0)


@pytest.fixture(scope="module")
def pipe(tiny_flux, student) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(tiny_flux, student)


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image to image", "inpainting"])
@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_latents_are_those_of_diffusers(family, kind, request, monkeypatch):
    """The teacher's, from the posterior's mean; diffusers draws a sample of it."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    name = {"flux": "Flux", "qwen": "QwenImage"}[family] + {"image to image": "Img2Img", "inpainting": "Inpaint"}[kind]
    theirs = getattr(diffusers, f"{name}Pipeline").from_pretrained(ASSETS / f"tiny-{family}")
    theirs.set_progress_bar_config(disable=True)
    ours = ArcFlowPipeline.from_pretrained(request.getfixturevalue(f"tiny_{family}"))
    height, width = SIZE
    shared = {"strength": 0.7, "num_inference_steps": 10, "height": height, "width": width, "output_type": "latent"}
    masks = {"mask_image": Image.fromarray(MASK)} if kind == "inpainting" else {}
    scale = {"true_cfg_scale": 1.0}
    if family == "flux":  # its pipeline pads to 512 tokens unless told otherwise
        length = ours.prompt_encoder.encoders["text_encoder_2"].length
        scale = {"guidance_scale": 1.0, "max_sequence_length": length}
    channels = ours.directory.config("transformer").in_channels // 4
    noise = torch.randn((1, channels, height // 8, width // 8), generator=torch.Generator().manual_seed(1))
    photo = Image.fromarray(PHOTOS[0])
    expected = theirs(
        PROMPTS[0], image=photo, generator=torch.Generator().manual_seed(1), **shared, **masks, **scale
    ).images
    guidance = {"guidance_scale": 1.0} if family == "flux" else {}
    made = ours(PROMPTS[0], image=photo, latents=noise.numpy(), **shared, **masks, **guidance).images
    assert relative_error(made, expected) < 1e-5
    other = ours(PROMPTS[0], image=photo, latents=noise.numpy(), **shared | {"strength": 0.6}, **masks, **guidance)
    assert relative_error(other.images, expected) > 0.01


def test_each_image_is_the_same_as_alone(pipe):
    settings = {"seed": 3, "strength": 0.7, "num_images_per_prompt": 2}
    made = pipe(PROMPTS, image=PHOTOS, mask_image=[MASK, ~MASK, MASK], batch_size=4, **settings).images
    for i, mask in enumerate((MASK, ~MASK, MASK)):
        settings["image"], settings["mask_image"] = Image.fromarray(PHOTOS[i]), Image.fromarray(mask)
        alone = list(pipe.stream(PROMPTS[i], first=2 * i, **settings))
        np.testing.assert_allclose(pixels(alone), pixels(made[2 * i : 2 * i + 2]), atol=1)
        assert [image.info for image in alone] == [image.info for image in made[2 * i : 2 * i + 2]]
    assert np.abs(pixels(made)[0] - pixels(made)[1]).max() > 20


def test_one_image_for_all_prompts_and_a_lean_device(pipe, tiny_flux, student):
    settings = {"seed": 3, "strength": 0.7, "batch_size": 2}
    made = pipe(PROMPTS, image=PHOTOS[0], mask_image=MASK, **settings).images
    each = pipe(
        PROMPTS, image=np.stack([PHOTOS[0]] * 3) / 255.0, mask_image=[MASK.astype(float)] * 3, **settings
    ).images
    np.testing.assert_allclose(pixels(made), pixels(each), atol=1)
    lean = ArcFlowPipeline.from_pretrained(tiny_flux, student, offload=True)
    np.testing.assert_array_equal(
        pixels(lean(PROMPTS, image=PHOTOS[0], mask_image=MASK, **settings).images), pixels(made)
    )


def test_strength_says_how_much_changes(pipe):
    settings = {"seed": 1, "image": PHOTOS[0], "output_type": "latent"}
    clean = pipe._image_encoder()(PHOTOS[0][None])
    changes = [
        np.abs(pipe(PROMPTS[0], strength=strength, **settings).images - clean).mean()
        for strength in (0.01, 0.3, 0.6, 0.9)
    ]
    assert changes == sorted(changes)
    assert changes[0] < 0.05 * changes[-1]
    from_noise = pipe(PROMPTS[0], seed=1, height=32, width=64, output_type="latent").images
    assert relative_error(pipe(PROMPTS[0], strength=1, **settings).images, from_noise) < 1e-5
    by_default = pipe(PROMPTS[0], **settings).images
    np.testing.assert_array_equal(by_default, pipe(PROMPTS[0], strength=0.6, **settings).images)


def test_compiles_nothing_for_another_strength_image_or_mask(pipe):
    def counts() -> list[int]:
        programs = (generate.sample_student, image_to_image.encode_image, generate.decode_latents)
        return [program._cache_size() for program in programs]

    pipe(PROMPTS[0], image=PHOTOS[0], mask_image=MASK, strength=0.9)
    before = counts()
    for i, strength in enumerate((0.8, 0.5, 0.2, 1)):  # two calls, one call, one call, two calls
        pipe(PROMPTS[i % 3], image=PHOTOS[i % 3], mask_image=np.roll(MASK, i, 1), strength=strength, seed=i)
    assert counts() == before


def test_inpainting_leaves_the_other_pixels_alone(pipe):
    mask = np.zeros((*SIZE, 3), np.uint8)
    mask[5:17, 9:30] = 128
    mask[20:] = 127  # more black than white
    image = pipe(PROMPTS[0], image=PHOTOS[0], mask_image=mask, strength=1.0, seed=2).images[0]
    made, repainted = np.asarray(image), mask[..., 0] == 128
    np.testing.assert_array_equal(made[~repainted], PHOTOS[0][~repainted])
    changed = (made != PHOTOS[0]).any(-1)
    assert changed[repainted].mean() > 0.9

    tokens = pipe(PROMPTS[0], image=PHOTOS[0], mask_image=mask, strength=1.0, seed=2, output_type="latent").images
    clean = pipe._image_encoder()(PHOTOS[0][None])
    sampled = mask_tokens(repainted[None], 8, 16)
    np.testing.assert_array_equal(tokens[~sampled], clean[~sampled])
    assert (tokens != clean)[sampled].mean() > 0.99


def test_a_latent_pixel_with_any_pixel_in_the_mask_is_sampled():
    mask = np.zeros((1, 32, 32), bool)
    mask[0, 8, 31] = True  # latent pixel (1, 3): token (0, 1), place (1, 1) of its patch
    tokens = mask_tokens(mask, 8, 16)  # [1, 4, 16]
    place = np.zeros((1, 4, 4, 2, 2), bool)  # [B, N, C, dy, dx]
    place[0, 1, :, 1, 1] = True
    np.testing.assert_array_equal(tokens, place.reshape(1, 4, 16))


def test_images_know_their_strength_and_no_path(pipe, tmp_path):
    Image.fromarray(PHOTOS[0]).save(tmp_path / "secret.png")
    with Image.open(tmp_path / "secret.png") as photo:
        info = pipe(PROMPTS[0], image=photo, strength=0.35).images[0].info
    assert info["strength"] == 0.35
    assert "secret" not in str(info)
    assert (info["height"], info["width"]) == SIZE
    assert "strength" not in pipe(PROMPTS[0], height=32, width=64).images[0].info


def test_the_start_is_that_of_the_models_schedule():
    """Of Qwen-Image's, with its stretch at the end, too."""

    def level(scheduler: Scheduler) -> float:
        model: Any = SimpleNamespace(scheduler=scheduler, family=SimpleNamespace(log_shift=None))
        return float(start_level(model, 4096, 0.6, 50))

    dynamic = Scheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    shift = np.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256))
    whole, last = (float(sigma_of(jnp.float32(t), shift)) for t in (0.6, 1 / 50))
    expected = 1 - (1 - whole) * 0.98 / (1 - last)
    assert level(dynamic) == pytest.approx(expected, rel=1e-5)
    assert level(Scheduler(shift=3.0)) == pytest.approx(1.8 / 2.2, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": MASK}, "mask_image is for an image to start from: give image as well, or leave mask_image out"),
        ({"strength": 0.5}, "strength is for an image to start from: give image as well, or leave strength out"),
        ({"image": PHOTOS[0], "strength": 0}, r"strength is 0, but has to be a number above 0 and at most 1"),
        ({"image": PHOTOS[0], "strength": 1.01}, r"strength is 1\.01, but has to be a number above 0 and at most 1"),
        ({"image": PHOTOS[0], "strength": float("nan")}, "strength is nan"),
        ({"image": PHOTOS[0][:30]}, "image size 30x64: height and width have to be positive multiples of 16"),
        ({"image": PHOTOS[0], "height": 64}, "height is 64, but image has 32: resize it, or leave height out"),
        ({"image": PHOTOS[:2]}, "image has 2 images, but has to have one, or one for each prompt, 3"),
        ({"image": []}, "image has 0 images"),
        ({"image": [*PHOTOS[:2], PHOTOS[2][:16]]}, "image has images of 32x64 and 16x64: give one size in a call"),
        (
            {"image": PHOTOS[0], "mask_image": MASK[:16]},
            "mask_image is 16x64, but has to have the size of image, 32x64",
        ),
        ({"image": PHOTOS[0] / 100.0}, "image has numbers outside of 0 to 1"),
        ({"image": np.full((32, 64, 3), np.nan)}, "image has numbers outside of 0 to 1"),
        ({"image": PHOTOS[0].astype(np.int32)}, "image is of int32, but has to be of uint8"),
        (
            {"image": PHOTOS[0][..., 0]},
            r"image is ndarray \[32, 64\], but has to be a PIL image or an array \[H, W, 3\]",
        ),
        ({"image": "photo.png"}, r"image is str, but has to be a PIL image or an array \[H, W, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_door(pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        pipe.stream(PROMPTS, **arguments)


def test_command(capfd, tiny_flux, student, tmp_path, pipe):
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.fromarray(PHOTOS[0]).save(photo)
    Image.fromarray(MASK).save(mask)
    model = ("sample", "--model", tiny_flux, "--adapter", student, "--prompt", PROMPTS[0])
    out = tmp_path / "made"
    code, stdout, stderr = run(capfd, *model, "--image", photo, "--mask", mask, "--strength", 0.8, "--out", out)
    assert code == 0, stderr
    with Image.open(stdout.strip()) as image:
        made = np.asarray(image)
        assert image.info["strength"] == "0.8"
        assert not {"photo", "mask"} & set(" ".join(map(str, image.info.values())).replace("/", " ").split())
    np.testing.assert_array_equal(made[~MASK], PHOTOS[0][~MASK])
    expected = pipe(PROMPTS[0], image=PHOTOS[0], mask_image=MASK, strength=0.8).images[0]
    np.testing.assert_allclose(made.astype(int), np.asarray(expected, int), atol=1)
    refused = (*model, "--out", tmp_path / "none")
    assert_refused(capfd, tmp_path, *refused, "--mask", mask, message="--mask is for an image to start from")
    assert_refused(capfd, tmp_path, *refused, "--image", tmp_path / "no.png", message="no.png")
