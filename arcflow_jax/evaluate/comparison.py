"""A converted teacher and its student over one base, compared on the same noises and prompts."""

# B prompts, N tokens, C latent channels, P points of comparison

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from arcflow_jax.checkpoints.model_directory import ModelDirectory
from arcflow_jax.checkpoints.student_formats import open_student
from arcflow_jax.checkpoints.training import AdapterDescription, checksum
from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.trajectory import Grid, compare, size
from arcflow_jax.families.latents import token_grid
from arcflow_jax.flow import sampler
from arcflow_jax.flow.schedule import boundaries, euler_grid, sigma_of
from arcflow_jax.generate import TEACHER_STEPS, default_dtype, memory_watched, seeded_noise, teacher_grid
from arcflow_jax.networks.conditioning import Guided
from arcflow_jax.networks.student import split_model
from arcflow_jax.parallel.mesh import parse_mesh, partition_spec, sharded, state_shardings


@functools.partial(jax.jit, static_argnames="graphdef")
def compare_models(
    graphdef: nnx.GraphDef,
    model_state: nnx.State,
    latents: jax.Array,
    conditioning: Any,
    teachers: Any,
    grid: Grid,
    shift: jax.Array,
    terminal: jax.Array | None,
) -> tuple[dict[str, dict[str, jax.Array]], jax.Array]:
    """What `trajectory.compare` measures of an `ArcModel` with a student, from noise `latents` [B, N, 4C].

    Args:
      conditioning, teachers: of student and teacher; the teacher's may be `Guided`.
      shift, terminal: of the teacher's Euler grid, see `schedule.euler_grid`.

    Returns:
      The same; and the mean square distances [B] to the teacher's data of what it makes in as few steps as the student.
    """
    model = nnx.merge(graphdef, model_state)

    def teacher(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return model.teacher_velocity(x, sigma, teachers)

    def student(x: jax.Array, sigma: jax.Array) -> Any:
        return model.student_curve(x, sigma, conditioning)

    sizes, end = compare(teacher, student, latents, grid)
    coarse = sampler.euler(teacher, latents, steps=grid.steps, shift=shift, terminal=terminal)
    return sizes, size(coarse - end)


@dataclasses.dataclass(frozen=True)
class ComparisonSettings:
    """What is compared, apart from prompts and weights. None takes what the student was trained for.

    Attributes:
      steps: the student's network calls.
      teacher_steps: the teacher's Euler steps.
      seed: of the noise.
      guidance: of the teacher, and of the student's guidance embedding, where there is one.
      negative_prompt: that true guidance of the teacher leads away from; for no such guidance, None if the student was
        trained without.
      norm_preserving: true guidance that leaves each token's velocity as long as it is without.
      height, width: in pixels; by default the model's own.
    """

    steps: int | None = None
    teacher_steps: int = TEACHER_STEPS
    seed: int = 0
    guidance: float | None = None
    negative_prompt: str | None = None
    norm_preserving: bool = False
    height: int | None = None
    width: int | None = None

    def resolved(self, student: AdapterDescription, vae: Any, cfg_guidance: float) -> ComparisonSettings:
        """With values for what is None; `vae` is the autoencoder's geometry. Raises UserError if some make no sense."""
        trained = student.distillation
        truly = trained.teacher_guidance == "cfg"
        published = student.guidance if truly or self.negative_prompt is None else cfg_guidance
        settings = dataclasses.replace(
            self,
            steps=trained.nfe if self.steps is None else self.steps,
            guidance=published if self.guidance is None else self.guidance,
            negative_prompt=trained.negative_prompt if truly and self.negative_prompt is None else self.negative_prompt,
            height=self.height or vae.sample_size,
            width=self.width or vae.sample_size,
        )
        for name in ("steps", "teacher_steps"):
            if getattr(settings, name) < 1:
                raise UserError(f"{name} is {getattr(settings, name)}, but has to be at least 1")
        if settings.norm_preserving and settings.negative_prompt is None:
            raise UserError("norm_preserving is of true guidance, which needs a negative_prompt")
        if None in (settings.height, settings.width):
            raise UserError("the model does not say how large its pictures are: name height and width")
        return settings


class Comparison:
    """Student and teacher, loaded; called with a batch of prompts, it compares them.

    The student's LoRA stands beside the base's weights, as in training, so that one copy of them serves both. (`arcflow
    sample` folds it into them, which in bfloat16 rounds a little differently.)

    Args:
      model: what `arcflow convert` wrote.
      adapter: what `arcflow sample` takes, see `pipeline.ArcFlowPipeline.from_pretrained`; `raw`, `mesh` likewise.
      batch_size: prompts at a time; by default one for each part that the mesh splits them into.

    Attributes:
      settings: with nothing left out.
      grid: where the trajectories are compared.
      of: what the figures depend on, beside the prompts; JSON.
      origin: where the weights came from; JSON.

    Raises:
      UserError: if model or adapter is missing or damaged, something does not fit, or the memory does not suffice.
    """

    def __init__(
        self,
        model: str | Path,
        adapter: str | Path,
        settings: ComparisonSettings,
        batch_size: int | None = None,
        mesh: str = "",
        raw: bool = False,
    ):
        directory, self.mesh = ModelDirectory.open(model), parse_mesh(mesh)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.batch_size = shards if batch_size is None else batch_size
        if self.batch_size < 1 or self.batch_size % shards:
            raise UserError(f"batch_size is {batch_size}, but has to be a positive multiple of data × fsdp = {shards}")
        student, restore = open_student(adapter, directory)
        vae = directory.config("vae")
        self.settings = settings = settings.resolved(student, vae, directory.family.cfg_guidance)
        self.rows, self.columns = token_grid(settings.height, settings.width, vae.factor)
        self.channels = directory.config("transformer").in_channels
        self.euler = teacher_grid(directory.scheduler, self.rows * self.columns)
        trained_for = student.distillation
        bounds = sigma_of(boundaries(settings.steps, trained_for.final_step_ratio), trained_for.shift)
        self.grid = Grid.of(euler_grid(settings.teacher_steps, *self.euler), bounds)

        dtype = default_dtype()
        with memory_watched(offload=True):  # nothing here could be
            self.encode = directory.family.prompts(directory, dtype, self.mesh)
            self.graphdef, base, trained = split_model(directory.student(student.adapter, dtype))
            trained = restore(sharded(self.mesh, trained), raw)
            base = directory.load("transformer", base, state_shardings(self.mesh, base))
            self.state = nnx.merge_state(base, trained)
            self.negative = None
            if settings.negative_prompt is not None:
                self.negative = self._encoded([settings.negative_prompt] * self.batch_size)
        self.origin = {"model": str(model), "adapter": str(adapter), "weights": "raw" if raw else "averaged"}
        self.of = {
            "base": directory.fingerprint,
            "adapter": f"{int(checksum(trained)):08x}",
            "dtype": jnp.dtype(dtype).name,
            "shift": trained_for.shift,
            "final_step_ratio": trained_for.final_step_ratio,
            **dataclasses.asdict(settings),
        }

    def __call__(self, prompts: Sequence[str], first: int) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
        """What `compare_models` returns, as NumPy arrays, of prompts `first` … of a list, each from its own noise.

        As many as `batch_size`. Raises UserError if the memory does not suffice.
        """
        latents = seeded_noise(self.settings.seed, len(prompts), self.rows * self.columns, self.channels, first)
        spec = partition_spec(self.mesh, ("batch", "tokens", None), latents.shape)
        latents = jax.device_put(latents, NamedSharding(self.mesh, spec))
        with memory_watched(offload=True):
            conditioning = teachers = self._encoded(prompts)
            if self.negative is not None:
                scale = jnp.float32(self.settings.guidance)
                teachers = Guided(conditioning, self.negative, scale, self.settings.norm_preserving)
            with jax.set_mesh(self.mesh):
                inputs = (self.graphdef, self.state, latents, conditioning, teachers)
                return jax.tree.map(np.asarray, compare_models(*inputs, self.grid, *self.euler))

    def _encoded(self, prompts: Sequence[str]) -> Any:
        settings = self.settings
        return self.encode(prompts, guidance=settings.guidance, rows=self.rows, columns=self.columns)
