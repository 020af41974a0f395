"""Prompt in, picture out: text encoders, sampler and decoder of a converted model, with or without a student."""

# B pictures, N tokens, C latent channels

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from arcflow_jax import arc_model, sampler
from arcflow_jax.checkpoint import AdapterDescription, load_adapter
from arcflow_jax.errors import UserError
from arcflow_jax.latents import token_grid, unpack
from arcflow_jax.model_directory import ModelDirectory
from arcflow_jax.prompts import PROMPTS, check_prompts
from arcflow_jax.schedule import scheduler_shift
from arcflow_jax.sharding import make_mesh, state_shardings


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"))
def sample(
    graphdef: nnx.GraphDef,
    model_state: tuple[nnx.State, nnx.State],
    latents: jax.Array,
    conditioning: Any,
    shift: jax.Array,
    final_step_ratio: jax.Array,
    *,
    steps: int,
) -> jax.Array:
    """The student's latent tokens [B, N, 4C] in `steps` network calls.

    Args:
      graphdef, model_state: the model as `arc_model.split` gives it: (base, adapter).
      latents: noise [B, N, 4C].
      conditioning: of the trunk, batch first.
      shift, final_step_ratio: the student's time warp and segments.
    """
    model = nnx.merge(graphdef, *model_state)

    def student(x: jax.Array, sigma: jax.Array) -> Any:
        return model.student_mixture(x, sigma, conditioning)

    return sampler.sample(student, latents, steps=steps, shift=shift, final_step_ratio=final_step_ratio)


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"))
def sample_teacher(
    graphdef: nnx.GraphDef, base: nnx.State, latents: jax.Array, conditioning: Any, shift: jax.Array, *, steps: int
) -> jax.Array:
    """The teacher's latent tokens [B, N, 4C] in `steps` Euler steps; arguments as for `sample`."""
    model = nnx.merge(graphdef, base)

    def teacher(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return model.teacher_velocity(x, sigma, conditioning)

    return sampler.euler(teacher, latents, steps=steps, shift=shift)


@functools.partial(jax.jit, static_argnames=("graphdef", "rows", "columns"))
def decode(graphdef: nnx.GraphDef, vae: nnx.State, tokens: jax.Array, *, rows: int, columns: int) -> jax.Array:
    """Pixels [B, H, W, 3], uint8, of latent tokens [B, N, 4C]."""
    pixels = nnx.merge(graphdef, vae).decode(unpack(tokens, rows, columns))
    return jnp.round(jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


def noise(seed: int, count: int, tokens: int, channels: int, first: int = 0) -> jax.Array:
    """Standard normal [B, N, 4C]; picture i of a seed gets the same noise whatever the batch it is made in."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), first + jnp.arange(count))
    return jax.vmap(lambda key: jax.random.normal(key, (tokens, channels)))(keys)


class ArcFlowPipeline:
    """A converted model with its student, ready to make pictures.

        pipe = ArcFlowPipeline.from_pretrained("checkpoints/flux", adapter="runs/flux")
        images = pipe(["a red fox in the snow"], steps=2, seed=0)

    Without an adapter there is only the teacher: `pipe.teacher(prompts, steps=50)`.
    """

    def __init__(self, directory: ModelDirectory, adapter: str | Path | None, dtype: Any):
        self.directory = directory
        mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
        self.description: AdapterDescription | None = None
        if adapter is None:
            self.graphdef, base = nnx.split(directory.abstract("transformer", dtype))
        else:
            self.description, checkpoints = load_adapter(adapter, directory.fingerprint)
            model = directory.student(self.description.adapter, dtype)
            self.student_graphdef, base, student = arc_model.split(model)
            with checkpoints:
                self.adapter = checkpoints.restore_ema(student)
            self.graphdef, _ = nnx.split(directory.abstract("transformer", dtype))
        self.base = directory.load("transformer", base, state_shardings(mesh, base))
        self.vae_graphdef, vae = nnx.split(directory.abstract("vae", dtype))
        self.vae = directory.load("vae", vae, state_shardings(mesh, vae))
        self.encode = PROMPTS[directory.description["pipeline"]](directory, dtype, mesh)

    @classmethod
    def from_pretrained(cls, path: str | Path, adapter: str | Path | None = None, dtype: Any = None) -> ArcFlowPipeline:
        """Loads a converted model and, if given, the averaged adapter of a training run.

        Args:
          path: what `arcflow convert` wrote.
          adapter: what `arcflow train` wrote.
          dtype: to compute in; by default bfloat16, but float32 on a CPU, where bfloat16 is slow.

        Raises:
          UserError: if either is missing or damaged, or the adapter was trained on another base.
        """
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        return cls(ModelDirectory.open(path), adapter, dtype)

    @property
    def default_size(self) -> int:
        """Side of the pictures that the model was made for, in pixels."""
        return self.directory.config("vae")["sample_size"]

    def grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Rows and columns of tokens. Raises UserError on a size that they do not fill."""
        factor = self.directory.geometry("vae").factor
        return token_grid(height or self.default_size, width or self.default_size, factor)

    def noise(self, seed: int, count: int, rows: int, columns: int, first: int = 0) -> jax.Array:
        """The noise that pictures `first` … of a seed start from, [B, N, 4C]."""
        return noise(seed, count, rows * columns, self.directory.geometry("transformer").in_channels, first)

    def student_latents(self, latents: jax.Array, conditioning: Any, steps: int) -> jax.Array:
        """See `sample`. Raises UserError if the pipeline has no student."""
        if self.description is None:
            raise UserError("no adapter was given: only the teacher can sample")
        settings = self.description.distillation
        shift, ratio = jnp.float32(settings.shift), jnp.float32(settings.final_step_ratio)
        state = (self.base, self.adapter)
        return sample(self.student_graphdef, state, latents, conditioning, shift, ratio, steps=steps)

    def teacher_latents(self, latents: jax.Array, conditioning: Any, steps: int) -> jax.Array:
        """See `sample_teacher`; the time warp is that of the model's scheduler."""
        shift = jnp.float32(scheduler_shift(self.directory.scheduler, latents.shape[1]))
        return sample_teacher(self.graphdef, self.base, latents, conditioning, shift, steps=steps)

    def decode(self, tokens: jax.Array, rows: int, columns: int) -> np.ndarray:
        """Pixels [B, H, W, 3], uint8."""
        return np.asarray(decode(self.vae_graphdef, self.vae, tokens, rows=rows, columns=columns))

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        steps: int = 2,
        seed: int = 0,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image.Image]:
        """Pictures from the student, one a prompt.

        Args:
          prompts: what the pictures should show.
          steps: network calls; the student was trained for `distillation.nfe` of them.
          seed: of the noise; picture i of a seed starts from the same noise whatever the batch.
          guidance: scale that the guidance embedding is fed, where there is one; by default the one that the
            student was trained at, or 3.5.
          height, width: in pixels; by default the model's own.

        Raises:
          UserError: on an empty prompt or a size that does not fit.
        """
        return self._pictures(self.student_latents, prompts, steps, seed, guidance, height, width)

    def teacher(
        self,
        prompts: Sequence[str],
        *,
        steps: int = 50,
        seed: int = 0,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image.Image]:
        """Pictures from the teacher in Euler steps; otherwise as a call of the pipeline."""
        return self._pictures(self.teacher_latents, prompts, steps, seed, guidance, height, width)

    def _pictures(self, latents_of, prompts, steps, seed, guidance, height, width) -> list[Image.Image]:
        check_prompts(prompts)
        if steps < 1:
            raise UserError(f"steps is {steps}, but has to be at least 1")
        if guidance is None:
            guidance = 3.5 if self.description is None else self.description.guidance
        rows, columns = self.grid(height, width)
        conditioning = self.encode(prompts, guidance=guidance, rows=rows, columns=columns)
        latents = latents_of(self.noise(seed, len(prompts), rows, columns), conditioning, steps)
        return [Image.fromarray(pixels) for pixels in self.decode(latents, rows, columns)]
