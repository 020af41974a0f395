"""The teacher of the shapes, `tiny-flux`."""

from __future__ import annotations

from arcflow_jax.demo import world
from arcflow_jax.networks.backbones.flux import FluxConfig
from arcflow_jax.networks.vaes.kl import AutoencoderKLConfig
from tools.tiny_teacher.teacher import Round, Teacher, VAERound

SHAPES = Teacher(
    name="tiny-flux",
    captions=world.CAPTIONS,
    draw=lambda work: world.random_images,
    vae=AutoencoderKLConfig(
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,  # enough for these images, and less for the denoiser to learn than FLUX.1's 16
        norm_num_groups=4,
        scaling_factor=1.0,  # set at assembly, from the latents' mean and standard deviation
        shift_factor=0.0,
    ),
    vae_rounds=(VAERound(steps=4_500, horizon=6_000),),
    judge={},
    judge_steps=2_500,
    text_steps=800,
    text_dtype="float32",
    transformer=FluxConfig(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    ),
    images=40_000,
    # All rounds draw more of the high noise levels, which decide everything that a caption leaves open
    rounds=(Round(5_000, 2e-3, 0.998, centre=0.4), Round(6_000, 1.5e-3, 0.999, centre=0.6)),
    guided_steps=4_000,
    guidance=(1.0, 3.0),
    every=500,
)
