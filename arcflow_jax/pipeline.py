"""Prompt in, image out: text encoders, sampler and VAE decoder of a converted model."""

# B images, N tokens, C latent channels

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from arcflow_jax import schema
from arcflow_jax.checkpoints.model_cache import converted
from arcflow_jax.checkpoints.model_directory import ModelDirectory
from arcflow_jax.checkpoints.student_formats import open_student
from arcflow_jax.checkpoints.training import AdapterDescription, checksum
from arcflow_jax.data.prompts import check_prompts
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import PATCH, as_tokens
from arcflow_jax.generate import (
    decode_latents,
    default_dtype,
    load_of,
    memory_watched,
    merge_student,
    merges,
    sample_student,
    sample_teacher,
    sampling_mesh,
    seeded_noise,
    teacher_grid,
)
from arcflow_jax.networks.conditioning import Conditioning, Guided
from arcflow_jax.networks.kernel import Compute
from arcflow_jax.networks.quantization import compute_in
from arcflow_jax.networks.student import merged_graphdef, split_model
from arcflow_jax.parallel.mesh import partition_spec, sharded
from arcflow_jax.parallel.offload import Offload, Weights, running_shardings
from arcflow_jax.sampling_settings import (
    Job,
    OutputType,
    PipelineOutput,
    Progress,
    SamplingSettings,
    batch_for,
    image_grid,
    resolve_settings,
)
from arcflow_jax.schema import Batch

# With `offload`, batches that pass one network before the next one takes its place on the device: enough to make the
# copying cheap, few enough to keep small what waits on the device between two networks.
OFFLOADED_BATCHES = 32


class ArcFlowPipeline:
    """A converted model, ready to make images: with an adapter the few-step student, without one the teacher.

        pipe = ArcFlowPipeline.from_pretrained("checkpoints/flux", adapter="runs/flux")
        images = pipe(["a red fox in the snow"], num_inference_steps=2, seed=0).images

    It runs on its own mesh, whatever mesh the caller has set with `jax.set_mesh`.

    Attributes:
      directory: the converted model.
      mesh: the devices that it runs on.
      student: the adapter's description; None for the teacher.
      origin: which weights made an image, as it stands in the image's `info`.
      transformer, vae: the weights; of the VAE only the decoder's.
      prompt_encoder: turns prompts into conditioning.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        adapter: str | Path | None,
        dtype: Any,
        mesh: Mesh,
        *,
        offload: Offload | None = None,
        raw: bool = False,
        merge: bool | None = None,
        compute: Compute | None = None,
        vae_tiling: bool | None = None,
    ):
        self.directory, self.mesh, self.offload, self.vae_tiling = directory, mesh, offload is not None, vae_tiling
        self._load = functools.partial(load_of, directory, dtype, mesh, offload=offload, tiled=vae_tiling)
        self.student: AdapterDescription | None = None
        self.origin = {
            "model": str(directory.path),
            "base": directory.fingerprint,
            "version": f"arcflow_jax {version('arcflow_jax')}",
        }

        def load(component: str, abstract: nnx.State, part: str = "") -> nnx.State:
            return directory.load(component, abstract, running_shardings(mesh, abstract, offload), part)

        # One after the other, so that an offloaded network has left the device before the next one is loaded
        self.prompt_encoder = directory.family.prompts(directory, dtype, mesh, offload)
        vae: Any = directory.abstract("vae", dtype)
        self.vae_graphdef, decoder = nnx.split(vae.decoder_alone())
        self.vae = Weights(load("vae", decoder, part="decoder"), self.offload)
        if adapter is None:
            network = directory.abstract("transformer", dtype)
            compute_in(network, compute)
            self.graphdef, base = nnx.split(network)
            self.transformer = Weights(load("transformer", base), self.offload)
            return
        self.student, restore = open_student(adapter, directory)
        network = directory.student(self.student.adapter, dtype)
        compute_in(network, compute)
        self.graphdef, base, trained = split_model(network)
        merge = merges(directory, merge, offload)
        merged = merged_graphdef(self.graphdef, base, trained) if merge else None
        trained = restore(sharded(mesh, trained), raw)
        self.origin |= {"adapter": str(adapter), "weights": "raw" if raw else "EMA"}
        self.origin |= {"lora": "merged" if merge else "apart", "adapter_checksum": f"{int(checksum(trained)):08x}"}
        if merged is None:
            # In the precision in which they are multiplied, which changes no result, and takes half the memory
            trained = jax.tree.map(lambda x: x.astype(dtype), trained)
            trained = jax.device_put(trained, running_shardings(mesh, trained, offload))
        state = load("transformer", base)
        if merged is None:
            state = nnx.merge_state(state, trained)
        else:
            state, self.graphdef = merge_student(self.graphdef, state, trained, mesh), merged
        self.transformer = Weights(state, self.offload)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        adapter: str | Path | None = None,
        *,
        dtype: Any = None,
        mesh: str | Mesh = "",
        offload: bool | Offload | None = None,
        raw: bool = False,
        merge: bool | None = None,
        compute: Compute | None = None,
        vae_tiling: bool | None = None,
    ) -> ArcFlowPipeline:
        """Loads a model and, if given, its student. Of a run that is still training, it takes the last checkpoint.

        Args:
          path_or_id: a directory that `arcflow convert` wrote; or a PyTorch model, a diffusers folder or a hub id,
            owner/name, which is converted on first use, see `model_cache.converted`.
          adapter: a directory that `arcflow train` wrote, or a student in the ArcFlow authors' layout, which may be on
            the hub: owner/name or owner/name/folder.
          dtype: precision of computation; by default what suits the device, see `generate.default_dtype`.
          mesh: how to use several devices, e.g. "tensor=4" (splits attention heads and MLPs) or
            "tensor=2,sequence=4" (image tokens as well), see `parallel.mesh.parse_mesh`; by default one device. Or a
            `jax.sharding.Mesh`, see `generate.sampling_mesh`.
          offload: "networks" or True keeps text encoders, transformer and VAE decoder in host memory, each on the
            device only while it runs: for a device that can hold the transformer, but not all of them. "blocks" also
            keeps their blocks there while they run, and copies each to the device just before its turn: for a device
            that cannot hold the transformer.
          raw: takes the weights of the last training step instead of the EMA weights.
          merge: adds LoRA to the base model's weights, see `merge_student`; False computes it beside them. By default
            True, unless the base model is quantized, or its blocks are in host memory.
          compute: "int8" or "fp8" multiplies activations in 8 bits as well, of a model with such weights: for chips
            that have such products.
          vae_tiling: decodes in tiles, the same images with less memory (`networks.vaes.vae`); None: large ones.

        Raises:
          UserError: if model or adapter is missing or damaged, the adapter was trained on another base model, the mesh
            does not fit the devices, or they run out of memory.
        """
        directory = ModelDirectory.open(converted(path_or_id))
        mesh = sampling_mesh(mesh)
        offload = "networks" if offload is True else offload or None
        dtype = default_dtype() if dtype is None else dtype
        load = functools.partial(load_of, directory, dtype, mesh, offload=offload, tiled=vae_tiling)
        options = {"offload": offload, "raw": raw, "merge": merge, "compute": compute, "vae_tiling": vae_tiling}
        with memory_watched(offload is not None, load), jax.set_mesh(mesh):
            return cls(directory, adapter, dtype, mesh, **options)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: np.ndarray | jax.Array | None = None,
        output_type: OutputType = "pil",
        batch_size: int | None = None,
        final_step_ratio: float | None = None,
        norm_preserving: bool = False,
        progress: Progress = lambda activity, done: None,
    ) -> PipelineOutput:
        """Makes images, those of the first prompt first.

        Args:
          prompt: what the images should show, one text or several.
          negative_prompt, num_inference_steps, guidance_scale, height, width, seed, final_step_ratio, norm_preserving:
            see `sampling_settings.resolve_settings`.
          num_images_per_prompt: each starts from noise of its own.
          latents: noise to start from instead of the seed's, one of each image: packed [B, N, 4C] or, as a latent image
            of PyTorch, [B, C, h, w].
          output_type: "pil", PIL images, with their settings in `info`; "np", an array [B, H, W, 3] of float32 between
            0 and 1, as in diffusers; "latent", the packed latents [B, N, 4C], float32.
          batch_size: images per batch. The last batch is filled up, so that it runs the same compiled program. By
            default 1, on several devices one for each part into which the mesh splits a batch.
          progress: is told the current activity and the number of finished images.

        Raises:
          UserError: on an empty prompt, settings that do not fit, or if the devices run out of memory.
        """
        if output_type not in ("pil", "np", "latent"):
            raise UserError(f"output_type is {output_type!r}, but has to be 'pil', 'np' or 'latent'")
        settings = self.settings(
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            seed=seed,
            final_step_ratio=final_step_ratio,
            norm_preserving=norm_preserving,
        )
        job = self._job(prompt, settings, num_images_per_prompt, latents, batch_size, 0, progress)
        if output_type == "latent":
            tokens = [np.asarray(batch) for _, group in self._latents(job) for batch in group]
            return PipelineOutput(np.concatenate(tokens)[: len(job.prompts)])
        images = list(self._images(job))
        if output_type == "pil":
            return PipelineOutput(images)
        return PipelineOutput(np.stack([np.asarray(image, np.float32) for image in images]) / 255)

    def stream(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        *,
        num_images_per_prompt: int = 1,
        latents: np.ndarray | jax.Array | None = None,
        batch_size: int | None = None,
        first: int = 0,
        wanted: range | None = None,
        progress: Progress = lambda activity, done: None,
        **settings: Any,
    ) -> Iterator[Image.Image]:
        """Yields each PIL image as soon as it is made. Arguments as for a call, apart from:

        Args:
          first: number of the first image, to continue where another call ended: the images start from the noises
            `first`, `first` + 1, … of the seed.
          wanted: which of the images to make, from the beginning of a batch on; by default all.
          settings: num_inference_steps, guidance_scale, height, width, seed, …, see
            `sampling_settings.resolve_settings`.

        Raises:
          UserError: as for a call; from the iterator, if the devices run out of memory.
        """
        resolved = self.settings(negative_prompt=negative_prompt, **settings)
        job = self._job(prompt, resolved, num_images_per_prompt, latents, batch_size, first, progress)
        return self._images(job if wanted is None else dataclasses.replace(job, wanted=wanted))

    def settings(self, **settings: Any) -> SamplingSettings:
        """The settings of a call, defaults filled in. Arguments and errors as for `resolve_settings`."""
        return resolve_settings(self.directory, self.student, **settings)

    def described(self, **settings: Any) -> dict[str, int | float | str]:
        """What images of these settings have in their `info`; arguments and errors as for `resolve_settings`."""
        return self._described(self.settings(**settings))

    # The parts of a call, for evaluations

    def together(self, batch_size: int | None = None) -> int:
        """How many images pass each network together. Raises UserError if the batch size does not fit the mesh."""
        return batch_for(self.mesh, batch_size) * (OFFLOADED_BATCHES if self.offload else 1)

    def grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of tokens; by default of the model's own size. Raises UserError if a side does not fit."""
        return image_grid(self.directory, height, width)

    def encode(self, prompts: Sequence[str], *, guidance: float, rows: int, columns: int) -> Conditioning:
        """The conditioning of B prompts, see `families.text.PromptEncoder`."""
        with self._running():
            return self.prompt_encoder(prompts, guidance=guidance, rows=rows, columns=columns)

    def noise(self, seed: int, count: int, rows: int, columns: int, first: int = 0) -> jax.Array:
        """The noise that images `first` … of a seed start from, [B, N, 4C]."""
        with self._running():
            return seeded_noise(seed, count, rows * columns, self.directory.config("transformer").in_channels, first)

    def denoise(
        self, latents: jax.Array, conditioning: Any, steps: int, final_step_ratio: float | None = None
    ) -> jax.Array:
        """From noise to latent tokens, [B, N, 4C]: the student's segments, or the teacher's Euler steps.

        The teacher's timestep shift is the one of the model's scheduler, the student's the one that it was trained
        with; so is, by default, the student's final-step ratio.
        """
        with self._running():
            return self.transformer.run(
                lambda state: self._denoise(state, latents, conditioning, steps, final_step_ratio)
            )

    def decode(self, tokens: jax.Array, rows: int, columns: int) -> np.ndarray:
        """Pixels [B, H, W, 3], uint8, of latent tokens [B, N, 4C]."""
        with self._running():
            return self.vae.run(lambda state: self._decode(state, tokens, rows, columns))

    def _denoise(
        self, state: nnx.State, latents: jax.Array, conditioning: Any, steps: int, final_step_ratio: float | None
    ) -> jax.Array:
        spec = partition_spec(self.mesh, ("batch", "tokens", None), latents.shape)
        latents = jax.device_put(latents, NamedSharding(self.mesh, spec))
        if self.student is None:
            grid = teacher_grid(self.directory, latents.shape[1], steps)
            return sample_teacher(self.graphdef, state, latents, conditioning, *grid, steps=steps)
        settings = self.student.distillation
        shift, ratio = jnp.float32(settings.shift), jnp.float32(final_step_ratio or settings.final_step_ratio)
        return sample_student(self.graphdef, state, latents, conditioning, shift, ratio, steps=steps)

    def _decode(self, state: nnx.State, tokens: jax.Array, rows: int, columns: int) -> np.ndarray:
        size = {"rows": rows, "columns": columns, "tiled": self.vae_tiling}
        return np.asarray(decode_latents(self.vae_graphdef, state, tokens, **size))

    def _described(self, settings: SamplingSettings) -> dict[str, int | float | str]:
        side = PATCH * self.directory.config("vae").factor  # of a token, in pixels
        size = {"height": settings.rows * side, "width": settings.columns * side}
        return size | settings.described() | self.origin

    @contextlib.contextmanager
    def _running(self) -> Generator[None]:
        with memory_watched(self.offload, self._load), jax.set_mesh(self.mesh):
            yield

    def _job(
        self,
        prompt: str | Sequence[str],
        settings: SamplingSettings,
        images_per_prompt: int,
        latents: np.ndarray | jax.Array | None,
        batch_size: int | None,
        first: int,
        progress: Progress,
    ) -> Job:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_prompts(prompts)
        batch_size = batch_for(self.mesh, batch_size)
        images_per_prompt = schema.converted(Batch, images_per_prompt, "num_images_per_prompt")
        prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        if latents is not None:
            settings = dataclasses.replace(settings, seed=None)
            size = (settings.rows, settings.columns, self.directory.config("transformer").in_channels)
            with self._running():
                latents = as_tokens(np.asarray(latents), len(prompts), *size)
        return Job(prompts, settings, latents, batch_size, first, range(len(prompts)), progress)

    def _encode(self, batches: Sequence[Sequence[str]], settings: SamplingSettings) -> Sequence[Conditioning | Guided]:
        """The conditioning of each batch of prompts, all of one size."""
        scale, rows, columns = settings.guidance, settings.rows, settings.columns
        if settings.negative_prompt is None:
            return self.prompt_encoder.batches(batches, guidance=scale, rows=rows, columns=columns)
        batches = [*batches, [settings.negative_prompt] * len(batches[0])]
        *positives, negative = self.prompt_encoder.batches(batches, guidance=1.0, rows=rows, columns=columns)
        return [Guided(positive, negative, jnp.float32(scale), settings.norm_preserving) for positive in positives]

    def _latents(self, job: Job) -> Iterator[tuple[int, list[jax.Array]]]:
        """Groups of batches that pass each network together: number of the first image, latent tokens of each batch."""
        settings, count = job.settings, len(job.prompts)
        for start in job.wanted[:: self.together(job.batch_size)]:
            starts = range(start, min(start + self.together(job.batch_size), job.wanted.stop), job.batch_size)
            # The images of each batch; the last batch is filled up with its last image
            batches = [np.minimum(np.arange(i, i + job.batch_size), count - 1) for i in starts]
            with self._running():
                job.progress("encoding", start)
                conditionings = self._encode([[job.prompts[i] for i in batch] for batch in batches], settings)
                if job.latents is not None:
                    noises = [job.latents[batch] for batch in batches]
                else:
                    seed, size = settings.seed or 0, (job.batch_size, settings.rows, settings.columns)
                    noises = [self.noise(seed, *size, job.first + i) for i in starts]
                job.progress("denoising", start)
                inputs = list(zip(noises, conditionings, strict=True))
                tokens = self.transformer.run(
                    lambda state, inputs=inputs: [
                        self._denoise(state, noise, conditioning, settings.steps, settings.final_step_ratio)
                        for noise, conditioning in inputs
                    ]
                )
            yield start, tokens

    def _images(self, job: Job) -> Iterator[Image.Image]:
        size, described = (job.settings.rows, job.settings.columns), self._described(job.settings)
        for start, tokens in self._latents(job):
            with self._running():
                job.progress("decoding", start)
                pixels = self.vae.run(lambda state, tokens=tokens: [self._decode(state, x, *size) for x in tokens])
            for i, array in zip(range(start, job.wanted.stop), np.concatenate(pixels), strict=False):
                image = Image.fromarray(array)
                image.info = {"prompt": job.prompts[i], "image": job.first + i} | described
                job.progress("writing", i + 1)
                yield image
