"""Preview images during a run: fixed prompts and noise; teacher, student, and the student with its EMA weights.

In a run with reference images, they show its first instructions instead, beside their references.
"""

# B images, N tokens, C latent channels

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from arcflow_jax.console import optional
from arcflow_jax.data.images import CaptionedImages
from arcflow_jax.data.output import labelled_sheet
from arcflow_jax.errors import cause_of
from arcflow_jax.families.latents import token_side
from arcflow_jax.generate import (
    TEACHER_STEPS,
    decode_latents,
    sample_student,
    sample_teacher,
    seeded_noise,
    teacher_grid,
)
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.conditioning import Guided, referring
from arcflow_jax.parallel.mesh import replicated, state_shardings
from arcflow_jax.parallel.offload import to_device
from arcflow_jax.parallel.processes import from_rows, local_rows
from arcflow_jax.references import rules_of
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.state import TrainState


@contextlib.contextmanager
def optional_preview() -> Iterator[None]:
    """Inside the `with` block, an error is a warning: a run does not need previews.

    Several processes draw together. There, only what fails in all of them alike can be left out.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and cause_of(error) != "memory":
            raise
        with optional("no preview"):
            raise


class Preview:
    """Draws sheets of images of a recipe's preview prompts, a row a prompt.

    Args:
      encode: prompts to conditioning.
      graphdef, base: definition of the model, and the teacher's weights.
      rows, columns: of tokens.
      to_latents, examples: the `LatentEncoder` and the instructions to show, of a run with reference images.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: ModelDirectory,
        encode: Any,
        graphdef: nnx.GraphDef,
        base: nnx.State,
        mesh: jax.sharding.Mesh,
        rows: int,
        columns: int,
        to_latents: Any = None,
        examples: Sequence[CaptionedImages] = (),
    ):
        self.prompts = tuple(example.caption for example in examples) or recipe.preview_prompts
        self.settings = recipe.distillation
        self.graphdef, self.base, self.mesh = graphdef, base, mesh
        self.rows, self.columns = rows, columns
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        padding = -len(self.prompts) % shards  # with the last one, so that the devices divide them evenly
        prompts = [*self.prompts, *self.prompts[-1:] * padding]
        own = local_rows(mesh, len(prompts))
        text = functools.partial(encode, guidance=recipe.guidance, rows=rows, columns=columns)
        self.conditioning = text([prompts[row] for row in own])
        self.references: dict[str, list[Image.Image]] = {}
        if to_latents is not None and examples:
            side = token_side(directory.config("vae").factor)
            pixels = to_latents.pixels([*examples, *examples[-1:] * padding], rows * side, columns * side)
            positions = rules_of(directory).positions([(rows, columns)] * len(pixels))
            self.conditioning = referring(self.conditioning, to_latents.references(pixels[:, own], positions))
            shown = np.rint((pixels[:, : len(examples)] + 1) * 127.5).astype(np.uint8)
            self.references = {f"reference {i}": [*map(Image.fromarray, each)] for i, each in enumerate(shown, 1)}
        self.teachers = self.conditioning
        if recipe.distillation.teacher_guidance == "cfg":
            negative = text([recipe.distillation.negative_prompt] * len(own))
            self.teachers = Guided(self.conditioning, negative, jnp.float32(recipe.guidance), norm_preserving=False)
        channels = directory.config("transformer").in_channels
        drawn = seeded_noise(recipe.seed, len(prompts), rows * columns, channels)
        self.noise = from_rows(np.asarray(drawn)[own], mesh)
        self.grid = teacher_grid(directory, rows * columns)
        self.vae_graphdef, decoder = nnx.split(directory.abstract("vae", recipe.dtype).decoder_alone())
        self.vae = directory.load("vae", decoder, state_shardings(mesh, decoder), part="decoder")
        self.teacher: list[Image.Image] | None = None  # its images, drawn once

    def sheet(self, state: TrainState) -> Image.Image:
        """The images of a state, labelled."""
        if self.teacher is None:
            self.teacher = self._images(state.adapter, teacher=True)
        columns = self.references | {
            f"teacher, {TEACHER_STEPS} steps": self.teacher,
            f"student, {self.settings.nfe} steps": self._images(state.adapter),
            f"EMA weights, {self.settings.nfe} steps": self._images(to_device(state.ema)),
        }
        return labelled_sheet(columns, self.prompts)

    def _images(self, adapter: nnx.State, teacher: bool = False) -> list[Image.Image]:
        """The student's images with an adapter, or the teacher's, which does not use it."""
        model, settings = nnx.merge_state(self.base, adapter), self.settings
        with jax.set_mesh(self.mesh):
            inputs = (self.graphdef, model, self.noise)
            if teacher:
                tokens = sample_teacher(*inputs, self.teachers, *self.grid, steps=TEACHER_STEPS)
            else:
                shift, ratio = jnp.float32(settings.shift), jnp.float32(settings.final_step_ratio)
                tokens = sample_student(*inputs, self.conditioning, shift, ratio, steps=settings.nfe)
            pixels = decode_latents(self.vae_graphdef, self.vae, tokens, rows=self.rows, columns=self.columns)
        whole = jax.device_put(pixels, replicated(self.mesh))  # each process holds only its part
        return [Image.fromarray(image) for image in np.asarray(whole)[: len(self.prompts)]]
