"""The teacher of the emoji world, a FLUX.1: what differs from the bundled shapes teacher."""

# C latent channels

from __future__ import annotations

import functools
from pathlib import Path

import jax
from flax import nnx

from arcflow_jax.demo import emoji as world
from arcflow_jax.networks.vaes.kl import AutoencoderKL, AutoencoderKLConfig
from tools.tiny_teacher import vae
from tools.tiny_teacher.common import Draw
from tools.tiny_teacher.glyphs import load_glyphs

VAE = AutoencoderKLConfig(
    block_out_channels=(16, 32, 64, 128),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=4,
    scaling_factor=1.0,  # set at assembly, from the latents' mean and standard deviation
    shift_factor=0.0,
)
VAE_TRAINING = vae.VAETraining(steps=7_000, horizon=7_000, ema=0.995, absolute=0.1, kl=5e-4, every=250)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(VAE, rngs=nnx.Rngs(0))


def drawer(work: Path) -> Draw:
    return functools.partial(world.random_images, glyphs=jax.numpy.asarray(load_glyphs(work)))


def make_vae(work: Path) -> None:
    vae.make_vae(work, new_vae, drawer(work), VAE_TRAINING)
