"""Prompt in, image out: text encoders, sampler and VAE decoder of a converted model."""

# B images, N tokens, C latent channels

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from arcflow_jax import schema
from arcflow_jax.data.prompts import check_prompts
from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import as_tokens, token_side
from arcflow_jax.generate import TEACHER_STEPS
from arcflow_jax.image_to_image import Beginning, GivenImages, given_images
from arcflow_jax.loaded_model import LoadedModel
from arcflow_jax.networks.conditioning import Conditioning, Guided, referring
from arcflow_jax.references import ReferenceSets, ReferenceTokens, reads_references, reference_sets
from arcflow_jax.sampling_settings import (
    Job,
    OutputType,
    PipelineOutput,
    Progress,
    SamplingSettings,
    batch_for,
    resolve_settings,
)
from arcflow_jax.schema import Batch

Item = TypeVar("Item")


class ArcFlowPipeline(LoadedModel):
    """A converted model, ready to make images: with an adapter the few-step student, without one the teacher.

        pipe = ArcFlowPipeline.from_pretrained("checkpoints/flux", adapter="runs/flux")
        images = pipe(["a red fox in the snow"], num_inference_steps=2, seed=0).images

    Its weights and their attributes are those of `LoadedModel`.
    """

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        *,
        image: GivenImages | None = None,
        mask_image: GivenImages | None = None,
        strength: float | None = None,
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
            see `sampling_settings.resolve_settings`. With an image, height and width are the image's by default.
          strength: see there; with an image 0.6 by default.
          image: PIL images, or arrays [H, W, 3] of uint8 or of floating-point numbers between 0 and 1. If the model
            reads reference images, and there is no strength and no mask_image, they are reference images: one or a list
            for all prompts, or a list of lists, one for each prompt. By default the images made have the size of the
            first.
            Otherwise they are what to start from instead of noise alone: one for all prompts or one for each, of one
            size.
          mask_image: for inpainting, likewise, also [H, W]: white is repainted; other pixels stay exactly as given.
          num_images_per_prompt: each starts from noise of its own.
          latents: noise to use instead of the seed's, one of each image: packed [B, N, 4C] or, as a latent image
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
        settings = {
            "negative_prompt": negative_prompt,
            "strength": strength,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "seed": seed,
            "final_step_ratio": final_step_ratio,
            "norm_preserving": norm_preserving,
        }
        images = (image, mask_image, num_images_per_prompt)
        job = self._job(prompt, settings, *images, latents, batch_size, 0, progress)
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
        image: GivenImages | None = None,
        mask_image: GivenImages | None = None,
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
        settings |= {"negative_prompt": negative_prompt}
        images = (image, mask_image, num_images_per_prompt)
        job = self._job(prompt, settings, *images, latents, batch_size, first, progress)
        return self._images(job if wanted is None else dataclasses.replace(job, wanted=wanted))

    def begin(
        self,
        prompts: Sequence[str],
        noise: jax.Array,
        *,
        image: GivenImages | None = None,
        mask_image: GivenImages | None = None,
        **settings: Any,
    ) -> Iterator[Image.Image]:
        """Hands one batch to the devices, and does not wait for it: the iterator does.

        Args:
          prompts: at most B. The batch is filled up with the last one.
          noise: [B, N, 4C], float32, on the devices. It is not checked, which would wait for what runs on them.
          image, mask_image, settings: as for `stream`.

        Raises:
          UserError: as for `stream`.
        """
        settings = {"negative_prompt": None} | settings
        job = self._job(prompts, settings, image, mask_image, 1, None, len(noise), 0, lambda activity, done: None)
        job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, seed=None), latents=noise)
        return self._fetched(job, self._described(job.settings, job.references), list(self._pixels(job)))

    def settings(self, **settings: Any) -> SamplingSettings:
        """The settings of a call, defaults filled in. Arguments and errors as for `resolve_settings`."""
        return resolve_settings(self.directory, self.student, **settings)

    def described(self, **settings: Any) -> dict[str, int | float | str]:
        """What images of these settings have in their `info`; arguments and errors as for `resolve_settings`."""
        return self._described(self.settings(**settings))

    def _described(
        self, settings: SamplingSettings, references: ReferenceSets | None = None
    ) -> dict[str, int | float | str]:
        side = token_side(self.directory.config("vae").factor)
        size = {"height": settings.rows * side, "width": settings.columns * side}
        count = {} if references is None else {"references": len(references.pixels)}
        return size | settings.described() | self.origin | count

    def _job(
        self,
        prompt: str | Sequence[str],
        settings: Mapping[str, Any],
        image: GivenImages | None,
        mask_image: GivenImages | None,
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
        given = references = None
        if image is not None and reads_references(self.directory, mask_image, settings):
            references, follows = reference_sets(self.directory, image, len(prompts), images_per_prompt, settings)
        else:
            given, follows = given_images(image, mask_image, len(prompts), images_per_prompt, settings)
        resolved = self.settings(**{**settings, **follows})
        prompts = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        if latents is not None:
            resolved = dataclasses.replace(resolved, seed=None)
            size = (resolved.rows, resolved.columns, self.directory.config("transformer").in_channels)
            with self._running():
                latents = as_tokens(np.asarray(latents), len(prompts), *size)
        return Job(prompts, resolved, latents, given, references, batch_size, first, range(len(prompts)), progress)

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
        beginning, references = self._beginning(job), self._references(job)
        for start in job.wanted[:: self.together(job.batch_size)]:
            starts = range(start, min(start + self.together(job.batch_size), job.wanted.stop), job.batch_size)
            # The images of each batch; the last batch is filled up with its last image
            batches = [np.minimum(np.arange(i, i + job.batch_size), count - 1) for i in starts]
            with self._running():
                job.progress("encoding", self._finished(job, start))
                conditionings = self._encode([[job.prompts[i] for i in batch] for batch in batches], settings)
                if references is not None:
                    pairs = zip(conditionings, batches, strict=True)
                    conditionings = [referring(conditioning, references(batch)) for conditioning, batch in pairs]
                if job.latents is not None:
                    whole = len(job.latents) == job.batch_size  # what fills a batch up may have any noise
                    noises = [job.latents if whole else job.latents[batch] for batch in batches]
                else:
                    seed, size = settings.seed or 0, (job.batch_size, settings.rows, settings.columns)
                    noises = [self.noise(seed, *size, job.first + i) for i in starts]
                job.progress("denoising", self._finished(job, start))
                begun = [beginning(noise, batch) for noise, batch in zip(noises, batches, strict=True)]
                inputs = list(zip(begun, conditionings, strict=True))
                tokens = self.transformer.run(
                    lambda state, inputs=inputs: [
                        self._denoise(state, x, conditioning, settings.steps, settings.final_step_ratio, *level)
                        for (x, *level), conditioning in inputs
                    ]
                )
            yield start, tokens

    def _beginning(self, job: Job) -> Callable[[jax.Array, np.ndarray], tuple[jax.Array, Any, Any]]:
        """Makes of the noise of a batch what it starts from; images load the VAE's encoder, at the first use."""
        given, strength = job.given, job.settings.strength
        if given is None or strength is None:
            return lambda noise, made: (noise, None, None)
        with self._running():
            job.progress("encoding", job.wanted.start)
            steps = job.settings.steps if self.student is None else TEACHER_STEPS
            return Beginning(self.directory, given, self._image_encoder(), strength, steps)

    def _references(self, job: Job) -> ReferenceTokens | None:
        """The latents of the reference images, if there are any; they load the VAE's encoder, at the first use."""
        if job.references is None:
            return None
        with self._running():
            job.progress("encoding", job.wanted.start)
            return ReferenceTokens(self.directory, job.references, self._image_encoder(), self.mesh)

    def _images(self, job: Job) -> Iterator[Image.Image]:
        batches = self._pixels(job)
        if not self.offload:  # the devices make the next batch while this one's images are fetched and written
            batches = one_ahead(batches)
        return self._fetched(job, self._described(job.settings, job.references), batches)

    def _fetched(
        self, job: Job, described: dict[str, int | float | str], batches: Iterable[tuple[int, list[jax.Array]]]
    ) -> Iterator[Image.Image]:
        """The images of batches of pixels, with what is `described` in their `info`."""
        for start, pixels in batches:
            with self._running():
                arrays = np.concatenate(pixels)
            for i, array in zip(range(start, job.wanted.stop), arrays, strict=False):
                image = Image.fromarray(array if job.given is None else job.given.composite(i, array))
                image.info = {"prompt": job.prompts[i], "image": job.first + i} | described
                job.progress("writing", i + 1)
                yield image

    def _pixels(self, job: Job) -> Iterator[tuple[int, list[jax.Array]]]:
        """`_latents`, decoded: each batch [B, H, W, 3], uint8, which may still be computed."""
        size = (job.settings.rows, job.settings.columns)
        for start, tokens in self._latents(job):
            with self._running():
                job.progress("decoding", self._finished(job, start))
                pixels = self.vae.run(lambda state, tokens=tokens: [self._decode(state, x, *size) for x in tokens])
            yield start, pixels

    def _finished(self, job: Job, start: int) -> int:
        """How many images are finished when the devices are given those from `start` on."""
        return start if self.offload else max(job.wanted.start, start - job.batch_size)


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each of them only after the next one was asked for."""
    held = list(itertools.islice(items, 1))
    for item in items:
        yield held.pop()
        held.append(item)
    yield from held
