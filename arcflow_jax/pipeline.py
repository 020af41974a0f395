"""Prompt in, picture out: text encoders, sampler and decoder of a converted model."""

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
    model_state: nnx.State,
    latents: jax.Array,
    conditioning: Any,
    shift: jax.Array,
    final_step_ratio: jax.Array,
    *,
    steps: int,
) -> jax.Array:
    """The student's latent tokens [B, N, 4C] in `steps` network calls.

    Args:
      graphdef, model_state: an `ArcModel` with a student, split.
      latents: noise [B, N, 4C].
      conditioning: of the trunk, batch first.
      shift, final_step_ratio: the student's time warp and segments.
    """
    model = nnx.merge(graphdef, model_state)

    def student(x: jax.Array, sigma: jax.Array) -> Any:
        return model.student_mixture(x, sigma, conditioning)

    return sampler.sample(student, latents, steps=steps, shift=shift, final_step_ratio=final_step_ratio)


@functools.partial(jax.jit, static_argnames=("graphdef", "steps"))
def sample_teacher(
    graphdef: nnx.GraphDef,
    model_state: nnx.State,
    latents: jax.Array,
    conditioning: Any,
    shift: jax.Array,
    *,
    steps: int,
) -> jax.Array:
    """The teacher's latent tokens [B, N, 4C] in `steps` Euler steps; arguments as for `sample`."""
    model = nnx.merge(graphdef, model_state)

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
    """A converted model, ready to make pictures: with an adapter the few-step student, without one the teacher.

        pipe = ArcFlowPipeline.from_pretrained("checkpoints/flux", adapter="runs/flux")
        images = pipe(["a red fox in the snow"], steps=2, seed=0)

    Attributes:
      directory: the converted model.
      student: what the adapter says of itself; None for the teacher.
      encode: prompts to conditioning (see `prompts.FluxPrompts`).
    """

    def __init__(self, directory: ModelDirectory, adapter: str | Path | None, dtype: Any):
        self.directory = directory
        self.student: AdapterDescription | None = None
        mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])

        def load(component: str, abstract: nnx.State) -> nnx.State:
            return directory.load(component, abstract, state_shardings(mesh, abstract))

        if adapter is None:
            self.graphdef, base = nnx.split(directory.abstract("transformer", dtype))
            self.state = load("transformer", base)
        else:
            self.student, checkpoints = load_adapter(adapter, directory.fingerprint)
            graphdef, base, trained = arc_model.split(directory.student(self.student.adapter, dtype))
            self.graphdef = arc_model.merged_graphdef(graphdef, base, trained)
            with checkpoints:
                trained = checkpoints.restore_ema(trained)
            merge = jax.jit(arc_model.merge_student, static_argnums=0, donate_argnums=1)
            self.state = merge(graphdef, load("transformer", base), trained)
        self.vae_graphdef, vae = nnx.split(directory.abstract("vae", dtype))
        self.vae = load("vae", vae)
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

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of tokens; the default is the model's own size. Raises UserError on one that they miss."""
        size = self.directory.config("vae")["sample_size"]
        return token_grid(height or size, width or size, self.directory.geometry("vae").factor)

    def noise(self, seed: int, count: int, rows: int, columns: int, first: int = 0) -> jax.Array:
        """The noise that pictures `first` … of a seed start from, [B, N, 4C]."""
        return noise(seed, count, rows * columns, self.directory.geometry("transformer").in_channels, first)

    def denoise(self, latents: jax.Array, conditioning: Any, steps: int) -> jax.Array:
        """From noise to latent tokens, [B, N, 4C]: the student's segments, or the teacher's Euler steps.

        The teacher's time warp is that of the model's scheduler, the student's the one that it was trained with.
        """
        if self.student is None:
            shift = jnp.float32(scheduler_shift(self.directory.scheduler, latents.shape[1]))
            return sample_teacher(self.graphdef, self.state, latents, conditioning, shift, steps=steps)
        settings = self.student.distillation
        shift, ratio = jnp.float32(settings.shift), jnp.float32(settings.final_step_ratio)
        return sample(self.graphdef, self.state, latents, conditioning, shift, ratio, steps=steps)

    def decode(self, tokens: jax.Array, rows: int, columns: int) -> np.ndarray:
        """Pixels [B, H, W, 3], uint8."""
        return np.asarray(decode(self.vae_graphdef, self.vae, tokens, rows=rows, columns=columns))

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        steps: int | None = None,
        seed: int = 0,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Image.Image]:
        """Pictures, one a prompt.

        Args:
          prompts: what the pictures should show.
          steps: network calls; by default those that the student was trained for, 50 for the teacher.
          seed: of the noise; picture i of a seed starts from the same noise whatever the batch.
          guidance: scale that the guidance embedding is fed, where there is one; by default the one that the
            student was trained at, 3.5 for the teacher.
          height, width: in pixels; by default the model's own.

        Raises:
          UserError: on an empty prompt or a size that does not fit.
        """
        check_prompts(prompts)
        if steps is None:
            steps = 50 if self.student is None else self.student.distillation.nfe
        if steps < 1:
            raise UserError(f"steps is {steps}, but has to be at least 1")
        if guidance is None:
            guidance = 3.5 if self.student is None else self.student.guidance
        rows, columns = self.grid(height, width)
        conditioning = self.encode(prompts, guidance=guidance, rows=rows, columns=columns)
        latents = self.denoise(self.noise(seed, len(prompts), rows, columns), conditioning, steps)
        return [Image.fromarray(pixels) for pixels in self.decode(latents, rows, columns)]
