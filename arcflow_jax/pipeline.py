"""Prompt in, picture out: text encoders, sampler and decoder of a converted model."""

# B pictures, N tokens, C latent channels

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from arcflow_jax.checkpoints.model_directory import ModelDirectory
from arcflow_jax.checkpoints.student_formats import open_student
from arcflow_jax.checkpoints.training import AdapterDescription, checksum
from arcflow_jax.data.prompts import check_prompts
from arcflow_jax.errors import UserError
from arcflow_jax.families.family import takes_guidance
from arcflow_jax.families.latents import PATCH, as_tokens, token_grid
from arcflow_jax.generate import (
    TEACHER_STEPS,
    decode_latents,
    default_dtype,
    memory_watched,
    merge_student,
    sample_student,
    sample_teacher,
    seeded_noise,
    teacher_grid,
)
from arcflow_jax.networks.conditioning import Guided
from arcflow_jax.networks.student import merged_graphdef, split_model
from arcflow_jax.parallel.mesh import parse_mesh, partition_spec, sharded, state_shardings
from arcflow_jax.parallel.offload import Weights

# Batches that pass one network before the next takes its place on the device, where weights are offloaded: enough
# for the copying not to count, few enough for what they leave on the device between the networks not to either.
OFFLOADED_BATCHES = 32


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """What a picture is made with, apart from its prompt and the weights.

    Attributes:
      steps: network calls.
      seed: of the noise; None if the noise is given.
      guidance: scale that the guidance embedding is fed, or of true guidance.
      rows, columns: of tokens.
      final_step_ratio: of the student's segments; None for the teacher.
      negative_prompt: that true guidance of the teacher leads away from; None for no such guidance.
      norm_preserving: whether it leaves the velocity's norm as it is.
    """

    steps: int
    seed: int | None
    guidance: float
    rows: int
    columns: int
    final_step_ratio: float | None
    negative_prompt: str | None
    norm_preserving: bool

    def described(self) -> dict[str, int | float | str]:
        """By name, as a picture's `info` has it."""
        names = [
            "steps",
            "seed",
            "guidance",
            "final_step_ratio",
            "negative_prompt",
            *["norm_preserving"] * self.norm_preserving,
        ]
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


class ArcFlowPipeline:
    """A converted model, ready to make pictures: with an adapter the few-step student, without one the teacher.

        pipe = ArcFlowPipeline.from_pretrained("checkpoints/flux", adapter="runs/flux")
        images = pipe(["a red fox in the snow"], steps=2, seed=0)

    Attributes:
      directory: the converted model.
      mesh: of the devices that it runs on.
      student: what the adapter says of itself; None for the teacher.
      origin: what its pictures say of the weights that made them.
      transformer, vae: the weights; of the autoencoder its decoder's alone.
      encode: prompts to conditioning (see `prompts.FluxPrompts`).
    """

    def __init__(
        self,
        directory: ModelDirectory,
        adapter: str | Path | None,
        dtype: Any,
        mesh: Mesh,
        offload: bool = False,
        raw: bool = False,
    ):
        self.directory, self.mesh, self.offload = directory, mesh, offload
        self.student: AdapterDescription | None = None
        self.origin = {
            "model": str(directory.path),
            "base": directory.fingerprint,
            "version": f"arcflow_jax {version('arcflow_jax')}",
        }

        def load(component: str, abstract: nnx.State, part: str = "") -> nnx.State:
            return directory.load(component, abstract, state_shardings(mesh, abstract), part)

        # Each in turn, so that what is offloaded has left the device before the next arrives
        self.encode = directory.family.prompts(directory, dtype, mesh, offload)
        self.vae_graphdef, decoder = nnx.split(directory.abstract("vae", dtype).decoder_alone())
        self.vae = Weights(load("vae", decoder, part="decoder"), offload)
        if adapter is None:
            self.graphdef, base = nnx.split(directory.abstract("transformer", dtype))
            self.transformer = Weights(load("transformer", base), offload)
        else:
            self.student, restore = open_student(adapter, directory)
            self.origin |= {"adapter": str(adapter), "weights": "raw" if raw else "averaged"}
            graphdef, base, trained = split_model(directory.student(self.student.adapter, dtype))
            self.graphdef = merged_graphdef(graphdef, base, trained)
            trained = restore(sharded(mesh, trained), raw)
            self.origin["adapter_checksum"] = f"{int(checksum(trained)):08x}"
            self.transformer = Weights(merge_student(graphdef, load("transformer", base), trained, mesh), offload)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        adapter: str | Path | None = None,
        dtype: Any = None,
        mesh: str = "",
        offload: bool = False,
        raw: bool = False,
    ) -> ArcFlowPipeline:
        """Loads a converted model and, if given, a student of it: of a run, which may be going on, the averaged one.

        Args:
          path: what `arcflow convert` wrote.
          adapter: what `arcflow train` wrote, or a student in the ArcFlow authors' layout; also on the hub, as
            owner/name or owner/name/folder.
          dtype: to compute in; by default bfloat16, but float32 on a CPU, where bfloat16 is slow.
          mesh: how to run on several devices, e.g. "tensor=4" (attention heads and MLPs are split) or
            "tensor=2,sequence=4" (image tokens as well), see `sharding.parse_mesh`; by default on one.
          offload: keeps text encoders, transformer and decoder in host memory, each on the device only while it
            runs: for a device that holds the transformer, but not all of them.
          raw: takes the adapter's weights as the last iteration left them instead of averaged.

        Raises:
          UserError: if either is missing or damaged, the adapter was trained on another base, there is no such
            mesh, or the memory does not suffice.
        """
        with memory_watched(offload):
            dtype = default_dtype() if dtype is None else dtype
            return cls(ModelDirectory.open(path), adapter, dtype, parse_mesh(mesh), offload, raw)

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of tokens; the default is the model's own size. Raises UserError on one that they miss."""
        vae = self.directory.config("vae")
        if vae.sample_size is None and None in (height, width):
            raise UserError(f"{self.directory.path} does not say how large its pictures are: name height and width")
        return token_grid(height or vae.sample_size, width or vae.sample_size, vae.factor)

    def noise(self, seed: int, count: int, rows: int, columns: int, first: int = 0) -> jax.Array:
        """The noise that pictures `first` … of a seed start from, [B, N, 4C]."""
        return seeded_noise(seed, count, rows * columns, self.directory.config("transformer").in_channels, first)

    def denoise(
        self, latents: jax.Array, conditioning: Any, steps: int, final_step_ratio: float | None = None
    ) -> jax.Array:
        """From noise to latent tokens, [B, N, 4C]: the student's segments, or the teacher's Euler steps.

        The teacher's time warp is that of the model's scheduler, the student's the one that it was trained with, as
        is by default the ratio of its last segment.
        """
        return self.transformer.run(lambda state: self._denoise(state, latents, conditioning, steps, final_step_ratio))

    def _denoise(
        self, state: nnx.State, latents: jax.Array, conditioning: Any, steps: int, final_step_ratio: float | None
    ) -> jax.Array:
        spec = partition_spec(self.mesh, ("batch", "tokens", None), latents.shape)
        latents = jax.device_put(latents, NamedSharding(self.mesh, spec))
        with jax.set_mesh(self.mesh):
            if self.student is None:
                grid = teacher_grid(self.directory.scheduler, latents.shape[1])
                return sample_teacher(self.graphdef, state, latents, conditioning, *grid, steps=steps)
            settings = self.student.distillation
            shift, ratio = jnp.float32(settings.shift), jnp.float32(final_step_ratio or settings.final_step_ratio)
            return sample_student(self.graphdef, state, latents, conditioning, shift, ratio, steps=steps)

    def decode(self, tokens: jax.Array, rows: int, columns: int) -> np.ndarray:
        """Pixels [B, H, W, 3], uint8."""
        return self.vae.run(lambda state: self._decode(state, tokens, rows, columns))

    def _decode(self, state: nnx.State, tokens: jax.Array, rows: int, columns: int) -> np.ndarray:
        with jax.set_mesh(self.mesh):
            return np.asarray(decode_latents(self.vae_graphdef, state, tokens, rows=rows, columns=columns))

    def __call__(self, prompts: str | Sequence[str], **settings: Any) -> list[Image.Image]:
        """All that `stream` yields, whose arguments it takes."""
        return list(self.stream(prompts, **settings))

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        images_per_prompt: int = 1,
        batch_size: int | None = None,
        latents: np.ndarray | jax.Array | None = None,
        first: int = 0,
        progress: Callable[[str, int], None] = lambda activity, done: None,
        **settings: Any,
    ) -> Iterator[Image.Image]:
        """Pictures, the first prompt's first, as they are made; each has its settings in its `info`.

        Args:
          prompts: what the pictures should show.
          images_per_prompt: each from noise of its own.
          batch_size: pictures made at a time. The last batch is filled up, so that it is the same compiled program.
            By default 1, on several devices one for each part that the mesh splits a batch into.
          latents: noise to start from in place of the seed's, a picture each: packed [B, N, 4C] or, as a latent
            image of PyTorch, [B, C, h, w].
          first: number of the first picture, to go on where another call ended: they start from the noises `first`,
            `first` + 1, … of the seed.
          progress: told what is going on, and how many pictures are done.
          settings: steps, seed, guidance, …, see `settings`.

        Raises:
          UserError: on an empty prompt, or settings that do not fit; from the iterator, if the memory does not
            suffice.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_prompts(prompts)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        batch_size = shards if batch_size is None else batch_size
        for name, value in (("images_per_prompt", images_per_prompt), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} is {value}, but has to be at least 1")
        if batch_size % shards:
            raise UserError(f"batch_size {batch_size} does not divide by data × fsdp = {shards} of the mesh")
        made_with = self.settings(**settings)
        prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        if latents is not None:
            channels = self.directory.config("transformer").in_channels
            made_with = dataclasses.replace(made_with, seed=None)
            latents = as_tokens(latents, len(prompts), made_with.rows, made_with.columns, channels)
        return self._watched(self._make(prompts, made_with, latents, batch_size, first, progress))

    def settings(
        self,
        *,
        steps: int | None = None,
        seed: int = 0,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        final_step_ratio: float | None = None,
        negative_prompt: str | None = None,
        norm_preserving: bool = False,
    ) -> SamplingSettings:
        """What `stream` makes pictures with, defaults filled in.

        Args:
          steps: network calls; by default those that the student was trained for, 50 for the teacher.
          seed: of the noise; picture i of a seed starts from the same noise whatever the batch.
          guidance: scale that the guidance embedding is fed, by default the one that the student was trained at, 3.5
            for the teacher; a model without guidance embedding takes none, but for true guidance.
          height, width: in pixels; by default the model's own.
          final_step_ratio: length of the student's last segment relative to the others; by default as trained.
          negative_prompt: guides the teacher away from this, which may be "": true classifier-free guidance by
            `guidance`, by default 4, in place of the guidance embedding.
          norm_preserving: true guidance that leaves each token's velocity as long as it is without.

        Raises:
          UserError: if they do not fit the model or one another.
        """
        steps = self.default_steps if steps is None else steps
        if steps < 1:
            raise UserError(f"steps is {steps}, but has to be at least 1")
        if final_step_ratio is not None and self.student is None:
            raise UserError("final_step_ratio is of a student's segments: the teacher has none")
        if final_step_ratio is not None and not final_step_ratio > 0:
            raise UserError(f"final_step_ratio is {final_step_ratio}, but has to be above 0")
        if final_step_ratio is None and self.student is not None:
            final_step_ratio = self.student.distillation.final_step_ratio
        if negative_prompt is not None and self.student is not None:
            raise UserError("negative_prompt is for the teacher: the student has its guidance built in")
        if norm_preserving and negative_prompt is None:
            raise UserError("norm_preserving is of true guidance, which needs a negative_prompt")
        if guidance is not None and negative_prompt is None and not self.takes_guidance:
            instead = "give the teacher a negative_prompt" if self.student is None else "its student has it built in"
            raise UserError(f"guidance is {guidance}, but this model has no guidance embedding: {instead}")
        if guidance is None:
            family = self.directory.family
            published = family.embedded_guidance if negative_prompt is None else family.cfg_guidance
            guidance = published if self.student is None else self.student.guidance
        rows, columns = self.grid(height, width)
        return SamplingSettings(
            steps, seed, guidance, rows, columns, final_step_ratio, negative_prompt, norm_preserving
        )

    def described(self, **settings: Any) -> dict[str, int | float | str]:
        """What pictures are made with, as their `info` has it; takes the arguments of `settings`, as that raises."""
        return self._described(self.settings(**settings))

    def _described(self, settings: SamplingSettings) -> dict[str, int | float | str]:
        side = PATCH * self.directory.config("vae").factor  # of a token, in pixels
        size = {"height": settings.rows * side, "width": settings.columns * side}
        return size | settings.described() | self.origin

    @property
    def takes_guidance(self) -> bool:
        """Whether the transformer is fed a guidance scale."""
        return takes_guidance(self.directory.config("transformer"))

    @property
    def default_steps(self) -> int:
        """Network calls that the student was trained for, 50 for the teacher."""
        return TEACHER_STEPS if self.student is None else self.student.distillation.nfe

    def _watched(self, pictures: Iterator[Image.Image]) -> Iterator[Image.Image]:
        with memory_watched(self.offload):
            yield from pictures

    def _encode(self, batches: Sequence[Sequence[str]], settings: SamplingSettings) -> list[Any]:
        """The conditioning of each batch of prompts, all equally large."""
        scale, rows, columns = settings.guidance, settings.rows, settings.columns
        if settings.negative_prompt is None:
            return self.encode.batches(batches, guidance=scale, rows=rows, columns=columns)
        batches = [*batches, [settings.negative_prompt] * len(batches[0])]
        *positives, negative = self.encode.batches(batches, guidance=1.0, rows=rows, columns=columns)
        return [Guided(positive, negative, jnp.float32(scale), settings.norm_preserving) for positive in positives]

    def _make(
        self,
        prompts: Sequence[str],
        settings: SamplingSettings,
        latents: jax.Array | None,
        batch_size: int,
        first: int,
        progress: Callable[[str, int], None],
    ) -> Iterator[Image.Image]:
        """A picture a prompt; see `stream`."""
        rows, columns = settings.rows, settings.columns
        together = batch_size * (OFFLOADED_BATCHES if self.offload else 1)
        for start in range(0, len(prompts), together):
            starts = range(start, min(start + together, len(prompts)), batch_size)
            # The pictures of each batch; the last batch is filled up with its last picture
            batches = [np.minimum(np.arange(i, i + batch_size), len(prompts) - 1) for i in starts]
            progress("encoding", start)
            texts = [[prompts[i] for i in batch] for batch in batches]
            conditionings = self._encode(texts, settings)
            if latents is None:
                noises = [self.noise(settings.seed, batch_size, rows, columns, first + i) for i in starts]
            else:
                noises = [latents[batch] for batch in batches]
            progress("denoising", start)
            inputs = list(zip(noises, conditionings, strict=True))
            tokens = self.transformer.run(
                lambda state, inputs=inputs: [
                    self._denoise(state, *each, settings.steps, settings.final_step_ratio) for each in inputs
                ]
            )
            progress("decoding", start)
            pixels = self.vae.run(
                lambda state, tokens=tokens: [self._decode(state, each, rows, columns) for each in tokens]
            )
            for i, picture in zip(range(start, len(prompts)), np.concatenate(pixels), strict=False):
                image = Image.fromarray(picture)
                image.info = {"prompt": prompts[i], "image": first + i} | self._described(settings)
                progress("writing", i + 1)
                yield image
