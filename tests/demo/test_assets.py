"""The bundled teachers are diffusers folders, and our pipeline makes the same images from them as diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo import ASSETS
from arcflow_jax.demo.judge import agreement
from arcflow_jax.demo.run import TEACHERS
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.recipe import read_config
from tools.tiny_teacher.emoji import EMOJI
from tools.tiny_teacher.glyphs import FONT, make_glyphs
from tools.tiny_teacher.shapes import SHAPES

# Guidance settings of diffusers' pipelines, and of ours
EMBEDDED = (lambda scale: {"guidance_scale": scale, "max_sequence_length": 16}, {})
GUIDANCE = {
    "tiny-emoji": EMBEDDED,
    "tiny-flux": EMBEDDED,
    "tiny-flux2": (lambda scale: {"guidance_scale": scale, "max_sequence_length": 32}, {"negative_prompt": ""}),
    "tiny-qwen": (lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", ""]}, {"negative_prompt": ""}),
}


@pytest.fixture(scope="module", params=GUIDANCE)
def teacher(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(teacher, request) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(request.getfixturevalue(teacher.replace("-", "_")))


def test_teacher_is_small(teacher):
    megabytes = sum(file.stat().st_size for file in (ASSETS / teacher).rglob("*") if file.is_file()) / 1e6
    assert megabytes <= (30 if teacher == "tiny-emoji" else 12)


def test_diffusers_makes_the_same_images(teacher, pipeline):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = diffusers.DiffusionPipeline.from_pretrained(ASSETS / teacher, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    prompts = read_prompts(TEACHERS[teacher].world.test_prompts).texts[:2]
    noise = pipeline.noise(0, 2, 4, 4)
    settings, own = GUIDANCE[teacher]
    packed = torch.from_numpy(np.array(noise))
    with torch.no_grad():
        images = theirs(
            prompt=prompts,
            num_inference_steps=3,
            height=64,
            width=64,
            latents=packed.mT.reshape(2, 16, 4, 4) if teacher == "tiny-flux2" else packed,
            output_type="np",
            **settings(2.0),
        ).images
    ours = pipeline(
        prompts,
        num_inference_steps=3,
        guidance_scale=2.0,
        latents=noise,
        batch_size=2,
        norm_preserving=teacher == "tiny-qwen",
        **own,
    ).images
    assert np.abs(np.stack(ours) / 255 - images).max() < 1.01 / 255  # but for rounding to 8 bits


@pytest.fixture(scope="module")
def true_images(teacher, tmp_path_factory) -> tuple[jax.Array, jax.Array]:
    """Images [B, P, P, 3] of random captions, and their attributes [B, A]."""
    work = tmp_path_factory.mktemp("images")
    if teacher == "tiny-emoji":
        pytest.importorskip("fontTools")
        if not FONT.exists():
            pytest.skip("the font is not installed")
        make_glyphs(work)
    maker = EMOJI if teacher == "tiny-emoji" else SHAPES
    return jax.jit(maker.draw(work), static_argnums=1)(jax.random.key(99), 256)


def test_judge_reads_true_images(teacher, true_images):
    images, attributes = true_images
    world = TEACHERS[teacher].world
    shares = agreement(world.read(images)[1], np.asarray(attributes), world.captions.values)
    assert min(shares.values()) >= (0.95 if teacher == "tiny-emoji" else 0.99), shares


@pytest.mark.slow
def test_vae_reconstructs_images(teacher, pipeline, true_images):
    """As well as the bar says, and so that the judge reads what they show."""
    images, attributes = (array[:64] for array in true_images)
    graphdef, abstract = nnx.split(pipeline.directory.abstract("vae", jnp.float32))
    model = nnx.merge(graphdef, pipeline.directory.load("vae", abstract))
    decoded = model.decode(model.encode(images))
    error = float(jnp.square(decoded - images).mean())
    assert 10 * np.log10(4 / error) >= (27 if teacher == "tiny-emoji" else 32)
    world = TEACHERS[teacher].world
    shares = agreement(world.read(decoded)[1], np.asarray(attributes), world.captions.values)
    assert min(shares.values()) >= 0.9, shares


@pytest.mark.slow
def test_fifty_steps_follow_the_prompts(teacher, pipeline):
    """With the guidance that the demo distils at."""
    world, config = TEACHERS[teacher]
    prompts = read_prompts(world.test_prompts).texts[:64]
    scale = read_config(config).guidance
    images = pipeline(prompts, seed=0, guidance_scale=scale, batch_size=64, **GUIDANCE[teacher][1]).images
    _, read = world.read(np.stack([np.asarray(image) for image in images]) / 127.5 - 1)
    asked = np.stack([world.captions.of(prompt).as_array() for prompt in prompts])
    shares = agreement(read, asked, world.captions.values)
    assert shares.pop("mean") >= 0.9
    assert min(shares.values()) >= (0.8 if teacher == "tiny-emoji" else 0.85)
