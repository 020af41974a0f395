"""The settings that images are made with, their defaults and checks; and what a call of the pipeline is and returns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from arcflow_jax import schema
from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.errors import UserError
from arcflow_jax.families.family import takes_guidance
from arcflow_jax.families.latents import token_grid
from arcflow_jax.generate import TEACHER_STEPS
from arcflow_jax.image_to_image import Given
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.references import ReferenceSets
from arcflow_jax.schema import NFE, Batch, Count, Guidance, Pixels, Ratio, Seed, Strength

OutputType = Literal["pil", "np", "latent"]
Progress = Callable[[str, int], None]  # (activity, number of finished images)


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """What an image is made with, apart from its prompt and the weights.

    Attributes:
      steps: NFE.
      seed: of the noise; None if the noise is given.
      guidance: scale that the guidance embedding is fed, or scale of CFG.
      rows, columns: of tokens.
      final_step_ratio: length of the student's last segment relative to the others; None for the teacher.
      negative_prompt: for CFG of the teacher; None for no CFG.
      norm_preserving: norm-preserving CFG.
      strength: where an image is the start, see `image_to_image.start_level`; None from noise.
    """

    steps: NFE
    seed: Seed | None
    guidance: Guidance
    rows: Count
    columns: Count
    final_step_ratio: Ratio | None
    negative_prompt: str | None
    norm_preserving: bool
    strength: Strength | None = None

    def __post_init__(self):
        schema.check(self)

    def described(self) -> dict[str, int | float | str]:
        """The settings by name, as they stand in an image's `info`."""
        names = ["steps", "seed", "guidance", "final_step_ratio", "strength", "negative_prompt"]
        values = {name: getattr(self, name) for name in [*names, *["norm_preserving"] * self.norm_preserving]}
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline returns.

    Attributes:
      images: a list of PIL images, or an array [B, …], see `output_type` of `ArcFlowPipeline.__call__`.
    """

    images: list[Image.Image] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Job:
    """The `wanted` ones of these images: one of each prompt, from `latents` or from noises `first` … of the seed; or
    from `given` images with that noise. `references` are what is read beside the prompts."""

    prompts: Sequence[str]
    settings: SamplingSettings
    latents: jax.Array | None
    given: Given | None
    references: ReferenceSets | None
    batch_size: int
    first: int
    wanted: range
    progress: Progress


RANGES: dict[str, Any] = {
    "num_inference_steps": NFE | None,
    "final_step_ratio": Ratio | None,
    "guidance_scale": Guidance | None,
    "strength": Strength | None,
    "height": Pixels | None,
    "width": Pixels | None,
}


def check_ranges(**settings: Any) -> list[Any]:
    """These settings, converted: what can be checked before a model is loaded. Raises UserError."""
    return [schema.converted(RANGES[name], value, name) for name, value in settings.items()]


def resolve_settings(
    directory: ModelDirectory,
    student: AdapterDescription | None,
    *,
    negative_prompt: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    final_step_ratio: float | None = None,
    norm_preserving: bool = False,
    strength: float | None = None,
) -> SamplingSettings:
    """Settings with the defaults filled in.

    Args:
      directory: the converted model.
      student: None samples from the teacher.
      negative_prompt: for the teacher: classifier-free guidance (CFG) away from this, which may be "", instead of the
        guidance embedding.
      num_inference_steps: NFE; by default as many as the student was trained for, 50 for the teacher.
      guidance_scale: scale that the guidance embedding is fed, by default the one that the student was trained at, 3.5
        for the teacher; with `negative_prompt` the scale of CFG, by default 4.
      height, width: in pixels; by default the model's own.
      seed: of the noise; image i of a seed starts from the same noise, whatever the batch size.
      final_step_ratio: length of the student's last segment relative to the others; by default as trained.
      norm_preserving: CFG that keeps the norm of each token's velocity, as diffusers does for Qwen-Image.
      strength: for an image to start from, above 0 and at most 1: how much of it is made anew. It starts with noise of
        the level σ that the schedule of the model's scheduler has at timestep t = strength, as in diffusers; 1 is pure
        noise.

    Raises:
      UserError: if the settings do not fit the model or one another.
    """
    steps, ratio, guidance, strength = check_ranges(
        num_inference_steps=num_inference_steps,
        final_step_ratio=final_step_ratio,
        guidance_scale=guidance_scale,
        strength=strength,
    )
    if norm_preserving and negative_prompt is None:
        raise UserError("norm_preserving is a kind of classifier-free guidance, which needs a negative_prompt")
    if student is None and ratio is not None:
        raise UserError("final_step_ratio is a setting of the student's segments: the teacher has none")
    if student is not None and negative_prompt is not None:
        raise UserError("negative_prompt is for the teacher: the student has its guidance built in")
    if guidance is not None and negative_prompt is None and not takes_guidance(directory.config("transformer")):
        instead = "give the teacher a negative_prompt" if student is None else "its student has it built in"
        raise UserError(f"guidance_scale is {guidance}, but this model has no guidance embedding: {instead}")
    rows, columns = image_grid(directory, height, width)
    if student is None:
        family = directory.family
        published = family.embedded_guidance if negative_prompt is None else family.cfg_guidance
        default_steps, default_guidance, default_ratio = TEACHER_STEPS, published, None
    else:
        trained = student.distillation
        default_steps, default_guidance, default_ratio = trained.nfe, student.guidance, trained.final_step_ratio
    return SamplingSettings(
        steps=default_steps if steps is None else steps,
        seed=schema.converted(Seed, seed, "seed"),
        guidance=default_guidance if guidance is None else guidance,
        rows=rows,
        columns=columns,
        final_step_ratio=default_ratio if ratio is None else ratio,
        negative_prompt=negative_prompt,
        norm_preserving=norm_preserving,
        strength=strength,
    )


def image_grid(directory: ModelDirectory, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """Rows and columns of tokens of an image; the default is the model's own size. Raises UserError if it has none, or
    a side does not fit."""
    height, width = check_ranges(height=height, width=width)
    vae = directory.config("vae")
    if vae.sample_size is None and None in (height, width):
        raise UserError(f"{directory.path} does not say how large its images are: name height and width")
    return token_grid(height or vae.sample_size, width or vae.sample_size, vae.factor)


def sides(size: object) -> tuple[int, int]:
    """Width and height of a text such as 1024x768. Raises UserError."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size) if isinstance(size, str) else None
    if found is None:
        raise UserError(f"size is {schema.shown(size)}, but has to be WIDTHxHEIGHT, such as 1024x1024")
    return int(found[1]), int(found[2])


def batch_for(mesh: Mesh, batch_size: int | None) -> int:
    """Images per batch: by default data × fsdp of the mesh, which has to divide it. Raises UserError if it does not."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = shards if batch_size is None else schema.converted(Batch, batch_size, "batch_size")
    if batch_size % shards:
        raise UserError(f"batch_size is {batch_size}, but has to be a multiple of data × fsdp = {shards} of the mesh")
    return batch_size


def batch_sizes(mesh: Mesh, largest: int) -> list[int]:
    """The sizes that batches of up to `largest` images have, the largest first: it, and below it the powers of two, in
    units of data × fsdp of the mesh. Raises UserError as `batch_for`."""
    unit = batch_for(mesh, None)
    units = batch_for(mesh, largest) // unit
    return sorted({largest, *(2**i * unit for i in range(units.bit_length()))}, reverse=True)
