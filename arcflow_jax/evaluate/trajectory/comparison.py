"""A converted teacher and its student, which share one copy of the base weights, compared from the same noise.

The student's LoRA stays apart from the base weights, as in training and in `ArcFlowPipeline` with merge=False: the
student samples exactly what the pipeline samples in that form and the same dtype. A pipeline with merge=True rounds
differently, in bfloat16 visibly so.
"""

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

from arcflow_jax import schema
from arcflow_jax.checkpoints.student_formats import open_student
from arcflow_jax.checkpoints.training import AdapterDescription, checksum
from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.trajectory.figures import Grid, compare, size
from arcflow_jax.families.latents import token_grid
from arcflow_jax.flow import sampler
from arcflow_jax.flow.curve import Curve
from arcflow_jax.flow.schedule import boundaries, euler_grid, sigma_of
from arcflow_jax.generate import TEACHER_STEPS, default_dtype, memory_watched, seeded_noise, teacher_grid
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.conditioning import Conditioning, Guided
from arcflow_jax.networks.student import split_model
from arcflow_jax.parallel.mesh import parse_mesh, partition_spec, sharded, state_shardings
from arcflow_jax.sampling_settings import batch_for
from arcflow_jax.schema import NFE, Guidance, Pixels, Seed


@functools.partial(jax.jit, static_argnames="graphdef")
def compare_models(
    graphdef: nnx.GraphDef,
    model_state: nnx.State,
    latents: jax.Array,
    conditioning: Conditioning,
    teacher_conditioning: Conditioning | Guided,
    grid: Grid,
    shift: jax.Array,
    terminal: jax.Array | None,
) -> tuple[dict[str, dict[str, jax.Array]], jax.Array]:
    """Measures, as `figures.compare` does, an `ArcModel` with a student, from noise `latents` [B, N, 4C].

    Args:
      conditioning: the student's.
      teacher_conditioning: the teacher's, which may be `Guided`.
      shift, terminal: the teacher's Euler grid, see `schedule.euler_grid`.

    Returns:
      The sizes that `figures.compare` returns.
      Mean square distances [B] between the teacher in as few steps as the student and the dense teacher.
    """
    model = nnx.merge(graphdef, model_state)

    def teacher(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return model.teacher_velocity(x, sigma, teacher_conditioning)

    def student(x: jax.Array, sigma: jax.Array) -> Curve:
        return model.student_curve(x, sigma, conditioning)

    sizes, end = compare(teacher, student, latents, grid)
    coarse = sampler.euler(teacher, latents, steps=grid.steps, shift=shift, terminal=terminal)
    return sizes, size(coarse - end)


@dataclasses.dataclass(frozen=True)
class ComparisonSettings:
    """How to compare, apart from prompts and weights. None means: as the student was trained.

    Attributes:
      steps: the student's steps.
      teacher_steps: the dense teacher's Euler steps.
      seed: seed of the noise.
      guidance: the teacher's guidance scale, which also feeds the student's guidance embedding if it has one.
      negative_prompt: the negative prompt of the teacher's classifier-free guidance (CFG). Without one, and for a
        student that was trained without CFG, the teacher uses none.
      norm_preserving: norm-preserving CFG, which keeps the length of each token's velocity.
      height, width: in pixels; by default the model's own.
    """

    steps: NFE | None = None
    teacher_steps: NFE = TEACHER_STEPS
    seed: Seed = 0
    guidance: Guidance | None = None
    negative_prompt: str | None = None
    norm_preserving: bool = False
    height: Pixels | None = None
    width: Pixels | None = None

    def __post_init__(self):
        schema.check(self)

    def resolved(self, student: AdapterDescription, vae: Any, cfg_guidance: float) -> ComparisonSettings:
        """Fills in every None; `vae` is the VAE's config. Raises UserError on settings that make no sense."""
        trained = student.distillation
        with_cfg = trained.teacher_guidance == "cfg"
        published = student.guidance if with_cfg or self.negative_prompt is None else cfg_guidance
        default_negative = trained.negative_prompt if with_cfg else None
        settings = dataclasses.replace(
            self,
            steps=trained.nfe if self.steps is None else self.steps,
            guidance=published if self.guidance is None else self.guidance,
            negative_prompt=default_negative if self.negative_prompt is None else self.negative_prompt,
            height=self.height or vae.sample_size,
            width=self.width or vae.sample_size,
        )
        if settings.norm_preserving and settings.negative_prompt is None:
            raise UserError("norm_preserving needs classifier-free guidance: give a negative_prompt too")
        if None in (settings.height, settings.width):
            raise UserError("the model does not state the size of its images: give height and width")
        return settings


class Comparison:
    """Student and teacher, loaded. Call it with a batch of prompts to compare them.

    Computes in the dtype that `ArcFlowPipeline.from_pretrained` computes in by default, with the LoRA unmerged.

    Args:
      model: a converted model, as `arcflow convert` writes it.
      adapter, mesh, raw: as for `ArcFlowPipeline.from_pretrained`.
      batch_size: prompts per call; by default data × fsdp of the mesh.

    Attributes:
      settings: the settings, with every None filled in.
      grid: the noise levels at which the trajectories are compared.
      identity: everything that the figures depend on, except the prompts; JSON.
      origin: where the weights came from; JSON.

    Raises:
      UserError: if model or adapter is missing or damaged, they do not fit each other or the settings, or the memory
        does not suffice.
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
        self.batch_size = batch_for(self.mesh, batch_size)
        student, restore = open_student(adapter, directory)
        vae = directory.config("vae")
        self.settings = settings = settings.resolved(student, vae, directory.family.cfg_guidance)
        self.rows, self.columns = token_grid(settings.height, settings.width, vae.factor)
        self.channels = directory.config("transformer").in_channels
        self.euler = teacher_grid(directory, self.rows * self.columns, settings.teacher_steps)
        distillation = student.distillation
        bounds = sigma_of(boundaries(settings.steps, distillation.final_step_ratio), distillation.shift)
        self.grid = Grid.between(euler_grid(settings.teacher_steps, *self.euler), bounds)

        dtype = default_dtype()
        with memory_watched(offload=True):  # True keeps the error from suggesting offload, which this cannot do
            self.encode = directory.family.prompts(directory, dtype, self.mesh)
            self.graphdef, base, trained = split_model(directory.student(student.adapter, dtype))
            trained = restore(sharded(self.mesh, trained), raw)
            base = directory.load("transformer", base, state_shardings(self.mesh, base))
            self.state = nnx.merge_state(base, trained)
            self.negative = None
            if settings.negative_prompt is not None:
                self.negative = self._encode([settings.negative_prompt] * self.batch_size)
        self.origin = {"model": str(model), "adapter": str(adapter), "weights": "raw" if raw else "EMA"}
        self.identity = {
            "base": directory.fingerprint,
            "adapter": f"{int(checksum(trained)):08x}",
            "dtype": jnp.dtype(dtype).name,
            "shift": distillation.shift,
            "final_step_ratio": distillation.final_step_ratio,
            **dataclasses.asdict(settings),
        }

    def __call__(self, prompts: Sequence[str], first: int) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
        """Compares on `batch_size` prompts; the first starts from the seed's noise number `first`, and so on.

        Returns what `compare_models` returns, as NumPy arrays. Raises UserError if the memory does not suffice.
        """
        latents = seeded_noise(self.settings.seed, len(prompts), self.rows * self.columns, self.channels, first)
        spec = partition_spec(self.mesh, ("batch", "tokens", None), latents.shape)
        latents = jax.device_put(latents, NamedSharding(self.mesh, spec))
        with memory_watched(offload=True):
            conditioning = teacher_conditioning = self._encode(prompts)
            if self.negative is not None:
                scale = jnp.float32(self.settings.guidance)
                teacher_conditioning = Guided(conditioning, self.negative, scale, self.settings.norm_preserving)
            with jax.set_mesh(self.mesh):
                inputs = (self.graphdef, self.state, latents, conditioning, teacher_conditioning)
                return jax.tree.map(np.asarray, compare_models(*inputs, self.grid, *self.euler))

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        settings = self.settings
        return self.encode(prompts, guidance=settings.guidance, rows=self.rows, columns=self.columns)
