"""What the trained teacher's images show, read by the judge: the bars that a finished teacher has to pass."""

# B prompts per batch, N tokens, A attributes

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from safetensors.flax import load_file

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.demo.judge import Judge, agreement
from arcflow_jax.demo.world import write_true_features
from arcflow_jax.evaluate.frechet import Moments
from arcflow_jax.families import latents as packing
from arcflow_jax.flow.sampler import euler
from arcflow_jax.storage.files import write_json
from tools.tiny_teacher import common, denoiser
from tools.tiny_teacher.teacher import Teacher
from tools.tiny_teacher.vae import new_vae

BATCH = 64
TOP = 5
DRAWN = 8  # true images of a test prompt


def as_grid(images: np.ndarray, columns: int) -> Image.Image:
    """One image of images [·, P, P, 3] in [-1, 1], row by row."""
    rows, side = len(images) // columns, images.shape[1]
    cells = images[: rows * columns].reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
    pixels = np.rint((np.clip(cells, -1, 1) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(pixels.reshape(rows * side, columns * side, 3))


def judged(judge: Judge, images: jax.Array, asked: np.ndarray, names: Any) -> dict[str, float]:
    """Agreement by attribute, and how often the first attribute is among the judge's TOP answers."""
    graphdef, state = nnx.split(judge)
    _, logits = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, images)
    shares = agreement(np.stack([each.argmax(-1) for each in logits], -1), asked, names)
    best = np.argsort(np.asarray(logits[0]), axis=-1)[:, -TOP:]
    first = next(iter(names))
    return {**shares, f"{first}, top {TOP}": float((best == asked[:, :1]).any(-1).mean())}


def load_networks(work: Path, teacher: Teacher) -> tuple[Any, Judge]:
    judge = Judge(teacher.captions.values, **teacher.world.judge_sizes, rngs=nnx.Rngs(0))
    return common.load_state(work / "vae.safetensors", new_vae(teacher)), common.load_state(
        work / "judge.safetensors", judge
    )


def check_vae(work: Path, teacher: Teacher, count: int = 512) -> None:
    """Prints the VAE's PSNR on images that it has not seen and what the judge reads in both; writes them as a grid."""
    vae, judge = load_networks(work, teacher)
    graphdef, state = nnx.split(vae)
    images, asked = teacher.draw(work)(jax.random.key(10**7), count)

    @jax.jit
    def again(state: nnx.State, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model.decode(model.encode(images))

    shown = jnp.concatenate([again(state, images[i : i + BATCH]) for i in range(0, count, BATCH)])
    names = teacher.captions.values
    figures = {
        "PSNR in dB": common.psnr(jnp.mean((jnp.clip(shown, -1, 1) - images) ** 2)),
        "originals": judged(judge, images, np.asarray(asked), names),
        "reconstructions": judged(judge, shown, np.asarray(asked), names),
    }
    print(json.dumps(figures, indent=2))
    pairs = np.stack([np.asarray(images), np.asarray(shown)], 1)[:72].reshape(-1, *images.shape[1:])
    as_grid(pairs, 12).save(work / "vae.png")


def make_true_features(work: Path, teacher: Teacher) -> None:
    """Draws the test prompts, and writes what the judge finds in these images."""
    world, render = dataclasses.replace(teacher.world, folder=work), teacher.renderer(work)
    asked = [world.captions.of(prompt).as_array() for prompt in read_prompts(world.test_prompts).texts]
    keys = (jax.random.fold_in(jax.random.key(1), i) for i in range(DRAWN))
    features = [world.read(render(key, jnp.asarray(np.stack(asked))))[0] for key in keys]
    write_true_features(work, Moments.from_features(np.concatenate(features)))


def measure(work: Path, teacher: Teacher, steps: int = 50) -> None:
    """Samples the test prompts at three guidance scales; prints what the judge reads, and writes the images."""
    vae, judge = load_networks(work, teacher)
    latents = load_file(work / "latents.safetensors")
    model = common.load_state(work / "guided.safetensors", denoiser.new_model(teacher))
    (graphdef, state), (vae_graphdef, vae_state) = nnx.split(model), nnx.split(vae)
    prompts = read_prompts(work / "prompts-test.txt").texts
    embed, size = denoiser.load_text(work / "text", prompts), denoiser.GRID

    @jax.jit
    def sample(state: nnx.State, vae_state: nnx.State, picked: jax.Array, guidance: jax.Array) -> jax.Array:
        network, (text, pooled) = nnx.merge(graphdef, state), embed(picked)
        scales = jnp.full(len(picked), guidance)
        conditioning = denoiser.FluxConditioning(text, pooled, scales, packing.position_ids(size, size))
        key = jax.random.fold_in(jax.random.key(1), picked[0])
        noise = jax.random.normal(key, (len(picked), size**2, teacher.transformer.in_channels))
        x = euler(lambda x, s: network.teacher_velocity(x, s, conditioning), noise, steps=steps, shift=1.0)
        return nnx.merge(vae_graphdef, vae_state).decode(
            packing.unpack(x / latents["scale"] + latents["shift"], size, size)
        )

    asked, every = np.stack([teacher.captions.of(prompt).as_array() for prompt in prompts]), {}
    for guidance in np.linspace(*teacher.guidance, 3):
        starts = range(0, len(prompts), BATCH)
        batches = [sample(state, vae_state, jnp.arange(i, i + BATCH), float(guidance)) for i in starts]
        images = jnp.concatenate(batches)
        every[f"guidance {guidance:g}"] = judged(judge, images, asked, teacher.captions.values)
        as_grid(np.asarray(images), 16).save(work / f"teacher-{guidance:g}.png")
    print(json.dumps(every, indent=2))
    write_json(work / "measures.json", every)
