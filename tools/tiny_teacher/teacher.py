"""What distinguishes one bundled FLUX.1 from another: its world, and the sizes of its networks and trainings."""

# B images per batch, P pixels along a side, A attributes

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from arcflow_jax.demo.captions import Captions
from arcflow_jax.demo.world import World
from arcflow_jax.networks.backbones.flux import FluxConfig
from arcflow_jax.networks.vaes.kl import AutoencoderKLConfig
from tools.tiny_teacher.common import Draw

# Draws images [B, P, P, 3] in [-1, 1] of captions [B, A]; the key draws what the captions leave open
Render = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAERound:
    """A round of the VAE's training; each starts from the last one's weights."""

    steps: int
    horizon: int  # steps that the learning rate decays over
    batch: int = 8
    peak: float = 1.5e-3  # learning rate
    ema: float = 0.0
    # Weights of the terms beside the mean squared error
    absolute: float = 0.0
    kl: float = 1e-3
    bend: float = 1e-2
    decoder_only: bool = False  # the encoder, and so the latents, stay as they are


@dataclasses.dataclass(frozen=True)
class Round:
    """A round of training; each starts from the last one's weights, with a warm restart (arXiv 1608.03983)."""

    steps: int
    peak: float  # learning rate
    ema: float
    centre: float = 0.0  # of logit σ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    name: str  # of its folder
    world: World
    renderer: Callable[[Path], Render]  # from the work folder
    vae: AutoencoderKLConfig
    vae_rounds: tuple[VAERound, ...]
    judge_steps: int
    text_steps: int
    text_dtype: str  # of the text encoders' file
    transformer: FluxConfig
    images: int  # encoded ones that the denoiser learns from
    rounds: tuple[Round, ...]
    guided_steps: int
    guidance: tuple[float, float]  # the range of scales that the last stage learns
    every: int  # steps from one saving of a training's progress to the next

    @property
    def captions(self) -> Captions[Any]:
        return self.world.captions

    def draw(self, work: Path) -> Draw:
        render = self.renderer(work)

        def images_of_random_captions(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
            caption_key, render_key = jax.random.split(key)
            attributes = self.captions.random(caption_key, count)
            return render(render_key, attributes), attributes

        return images_of_random_captions
