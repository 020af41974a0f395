"""Pictures while a run goes on: fixed prompts and noises, the teacher beside the student, raw and averaged."""

# B pictures, N tokens, C latent channels

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from arcflow_jax.checkpoints.model_directory import ModelDirectory
from arcflow_jax.data.output import labelled_sheet
from arcflow_jax.generate import (
    TEACHER_STEPS,
    decode_latents,
    sample_student,
    sample_teacher,
    seeded_noise,
    teacher_grid,
)
from arcflow_jax.networks.conditioning import Guided
from arcflow_jax.parallel.mesh import replicated, state_shardings
from arcflow_jax.parallel.processes import from_part, local_part
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.state import TrainState


class Preview:
    """Draws sheets of a recipe's preview prompts, a row a prompt.

    Args:
      encode: prompts to conditioning.
      graphdef, base: of the model, and the teacher's weights.
      rows, columns: of tokens.
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
    ):
        self.prompts, self.settings = recipe.preview_prompts, recipe.distillation
        self.graphdef, self.base, self.mesh = graphdef, base, mesh
        self.rows, self.columns = rows, columns
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        # Filled up with the last, so that each device draws its share
        prompts = [*self.prompts, *self.prompts[-1:] * (-len(self.prompts) % shards)]
        index, count = local_part(mesh)
        own = slice(index * len(prompts) // count, (index + 1) * len(prompts) // count)
        text = functools.partial(encode, guidance=recipe.guidance, rows=rows, columns=columns)
        self.conditioning = self.teachers = text(prompts[own])
        if recipe.distillation.teacher_guidance == "cfg":
            negative = text([recipe.distillation.negative_prompt] * len(prompts[own]))
            self.teachers = Guided(self.conditioning, negative, jnp.float32(recipe.guidance), norm_preserving=False)
        channels = directory.config("transformer").in_channels
        drawn = seeded_noise(recipe.seed, len(prompts), rows * columns, channels)
        self.noise = from_part(np.asarray(drawn)[own], mesh)
        self.grid = teacher_grid(directory.scheduler, rows * columns)
        self.vae_graphdef, decoder = nnx.split(directory.abstract("vae", recipe.dtype).decoder_alone())
        self.vae = directory.load("vae", decoder, state_shardings(mesh, decoder), part="decoder")
        self.teacher: list[Image.Image] | None = None

    def sheet(self, state: TrainState) -> Image.Image:
        """The pictures of a state, labelled."""
        if self.teacher is None:  # its pictures stay the same
            self.teacher = self._pictures(state.adapter, teacher=True)
        columns = {
            f"teacher, {TEACHER_STEPS} steps": self.teacher,
            f"student, {self.settings.nfe} steps": self._pictures(state.adapter),
            f"averaged, {self.settings.nfe} steps": self._pictures(state.ema),
        }
        return labelled_sheet(columns, self.prompts)

    def _pictures(self, adapter: nnx.State, teacher: bool = False) -> list[Image.Image]:
        """What the student makes with an adapter, or the teacher, who passes it over."""
        model, settings = nnx.merge_state(self.base, adapter), self.settings
        with jax.set_mesh(self.mesh):
            inputs = (self.graphdef, model, self.noise)
            if teacher:
                tokens = sample_teacher(*inputs, self.teachers, *self.grid, steps=TEACHER_STEPS)
            else:
                shift, ratio = jnp.float32(settings.shift), jnp.float32(settings.final_step_ratio)
                tokens = sample_student(*inputs, self.conditioning, shift, ratio, steps=settings.nfe)
            pixels = decode_latents(self.vae_graphdef, self.vae, tokens, rows=self.rows, columns=self.columns)
        whole = jax.device_put(pixels, replicated(self.mesh))  # of several processes each has its part
        return [Image.fromarray(picture) for picture in np.asarray(whole)[: len(self.prompts)]]
