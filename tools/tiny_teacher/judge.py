"""The judge: a classifier of rendered images, trained to read noisy and blurred ones too."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from arcflow_jax.demo.judge import Judge, agreement
from tools.tiny_teacher.common import train
from tools.tiny_teacher.teacher import Teacher


def spoil(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mixes in a random share of a 3×3 mean, and adds noise of a random strength up to 0.1."""
    blur_key, strength_key, noise_key = jax.random.split(key, 3)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    side = images.shape[1]
    mean = sum(padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)) / 9
    share = jax.random.uniform(blur_key, (len(images), 1, 1, 1))
    strength = 0.1 * jax.random.uniform(strength_key, (len(images), 1, 1, 1))
    return images + share * (mean - images) + strength * jax.random.normal(noise_key, images.shape)


def make_judge(work: Path, teacher: Teacher, batch: int = 32) -> None:
    attributes, draw = teacher.captions.values, teacher.draw(work)
    graphdef, state = nnx.split(Judge(attributes, **teacher.world.judge_sizes, rngs=nnx.Rngs(0)))

    def loss(state: nnx.State, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        image_key, spoil_key = jax.random.split(key)
        images, asked = draw(image_key, batch)
        _, logits = nnx.merge(graphdef, state)(spoil(spoil_key, images))
        losses = []
        for i, each in enumerate(logits):
            loss_of_each = optax.softmax_cross_entropy_with_integer_labels(each, asked[:, i])
            losses.append(jnp.where(asked[:, i] >= 0, loss_of_each, 0.0))
        return sum(losses).mean(), {"cross-entropy": sum(losses).mean()}

    @jax.jit
    def read(state: nnx.State) -> tuple[jax.Array, jax.Array]:
        images, asked = draw(jax.random.key(10**6), 2048)
        return nnx.merge(graphdef, state).read(images), asked

    def report(state: nnx.State) -> dict[str, float]:
        return agreement(*map(np.asarray, read(state)), attributes)

    result = work / "judge.safetensors"
    train(loss, state, steps=teacher.judge_steps, peak=3e-3, every=teacher.every, report=report, result=result)
