"""The teacher of the emoji world, `tiny-emoji`."""

from __future__ import annotations

import functools
from pathlib import Path

import jax.numpy as jnp

from arcflow_jax.demo import emoji
from arcflow_jax.networks.backbones.flux import FluxConfig
from arcflow_jax.networks.vaes.kl import AutoencoderKLConfig
from tools.tiny_teacher.glyphs import load_glyphs
from tools.tiny_teacher.teacher import Render, Round, Teacher, VAERound


def renderer(work: Path) -> Render:
    return functools.partial(emoji.render, glyphs=jnp.asarray(load_glyphs(work)))


EMOJI = Teacher(
    name="tiny-emoji",
    world=emoji.WORLD,
    renderer=renderer,
    vae=AutoencoderKLConfig(
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        scaling_factor=1.0,  # set at assembly, from the latents' mean and standard deviation
        shift_factor=0.0,
    ),
    vae_rounds=(
        VAERound(steps=4_000, horizon=5_000, ema=0.995, absolute=0.1, kl=5e-4),
        VAERound(steps=3_000, horizon=3_000, ema=0.995, absolute=0.1, decoder_only=True),
    ),
    judge_steps=2_500,
    text_steps=1_000,
    text_dtype="bfloat16",
    transformer=FluxConfig(
        in_channels=32,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    ),
    images=80_000,
    rounds=(
        Round(4_000, 1.5e-3, 0.998, centre=0.2),
        Round(6_000, 1e-3, 0.999, centre=0.2),
        Round(6_000, 1e-3, 0.999, centre=0.2),
    ),
    guided_steps=2_000,
    guidance=(1.0, 4.0),
    every=250,
)
