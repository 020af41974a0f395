"""Compares samplers on the demo's images: each gets the same prompts and noise, and they are timed side by side."""

# B images per batch, N tokens, C latent channels

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arcflow_jax.console import progress_bar
from arcflow_jax.demo.judge import agreement
from arcflow_jax.demo.world import World
from arcflow_jax.evaluate.diversity import mean_pairwise_distance
from arcflow_jax.evaluate.frechet import Moments, frechet_distance
from arcflow_jax.networks.conditioning import Guided
from arcflow_jax.pipeline import ArcFlowPipeline

BATCH = 16
SEED = 1  # of the evaluation's noise


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A student or teacher, with a number of steps."""

    pipeline: ArcFlowPipeline
    steps: int

    def __call__(self, noise: jax.Array, conditioning: object) -> jax.Array:
        return self.pipeline.denoise(noise, conditioning, self.steps)


@dataclasses.dataclass
class Results:
    """What one sampler made, and how long each batch of B took."""

    latents: list[np.ndarray] = dataclasses.field(default_factory=list)  # [B, N, 4C]
    pixels: list[np.ndarray] = dataclasses.field(default_factory=list)  # [B, H, W, 3] uint8
    denoise_seconds: list[float] = dataclasses.field(default_factory=list)
    path_seconds: list[float] = dataclasses.field(default_factory=list)  # from prompt to image


def timed(call: Callable[[], object]) -> tuple[object, float]:
    """What a call returns, and the seconds until the device has finished it."""
    start = time.perf_counter()
    value = jax.block_until_ready(call())
    return value, time.perf_counter() - start


def run_samplers(
    samplers: dict[str, Sampler],
    captions: Sequence[Any],
    guidance: float,
    negative_prompt: str | None = None,
    seed: int = SEED,
) -> dict[str, Results]:
    """Runs every sampler on every caption. They take turns, so that changes of the machine's speed affect all.

    A first batch, which compiles, is not counted.

    Args:
      guidance: the scale of the guidance embedding, or of the teacher's classifier-free guidance (CFG).
      negative_prompt: the negative prompt of the teacher's CFG; None for no CFG.
      seed: of the noises.
    """
    results = {name: Results() for name in samplers}
    batches = [list(map(str, captions[i : i + BATCH])) for i in range(0, len(captions), BATCH)]
    shared = next(iter(samplers.values())).pipeline
    rows, columns = shared.grid()

    def prepare(prompts: list[str]) -> object:
        return shared.encode(prompts, guidance=guidance, rows=rows, columns=columns)

    with progress_bar(transient=True) as bar:
        task = bar.add_task("sampling", total=len(batches), text="compiling")
        for index, counted in [(0, False), *((index, True) for index in range(len(batches)))]:
            noise = shared.noise(seed, len(batches[index]), rows, columns, first=index * BATCH)
            conditioning, encode_seconds = timed(lambda i=index: prepare(batches[i]))
            guided = with_cfg(shared, conditioning, len(batches[index]), guidance, negative_prompt)
            for name, sampler in samplers.items():
                own = guided if sampler.pipeline.student is None else conditioning
                latents, denoise_seconds = timed(lambda s=sampler, n=noise, c=own: s(n, c))
                pixels, decode_seconds = timed(lambda x=latents: shared.decode(x, rows, columns))
                if counted:
                    result = results[name]
                    result.latents.append(np.asarray(latents))
                    result.pixels.append(pixels)
                    result.denoise_seconds.append(denoise_seconds)
                    result.path_seconds.append(encode_seconds + denoise_seconds + decode_seconds)
            bar.update(task, advance=counted, text="")
    return results


def with_cfg(
    pipeline: ArcFlowPipeline, conditioning: Any, count: int, guidance: float, negative_prompt: str | None
) -> Any:
    """The teacher's conditioning of `count` prompts: with classifier-free guidance if there is a negative prompt."""
    if negative_prompt is None:
        return conditioning
    rows, columns = pipeline.grid()
    negative = pipeline.encode([negative_prompt] * count, guidance=guidance, rows=rows, columns=columns)
    return Guided(conditioning, negative, jnp.float32(guidance), norm_preserving=False)


def features_and_attributes(world: World, result: Results) -> list[np.ndarray]:
    """What the judge finds in all of a sampler's images: features and attributes."""
    found = [world.read(batch / 127.5 - 1) for batch in result.pixels]
    return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]


def diversity(
    world: World,
    samplers: dict[str, Sampler],
    captions: Sequence[Any],
    guidance: float,
    negative_prompt: str | None = None,
) -> dict[str, float]:
    """For each sampler, how different `BATCH` images of a caption are: the mean over captions.

    The mean of 1 − cosine of the judge's features over all pairs of a caption's images. Arguments after
    the world as for `run_samplers`. All samplers start from the same noises.
    """
    repeated = [caption for caption in captions for _ in range(BATCH)]
    results = run_samplers(samplers, repeated, guidance, negative_prompt)
    found = {}
    for name, result in results.items():
        features, _ = features_and_attributes(world, result)
        found[name] = float(mean_pairwise_distance(features.reshape(len(captions), BATCH, -1)).mean())
    return found


def measure(
    world: World, results: dict[str, Results], captions: Sequence[Any], against: str
) -> dict[str, dict[str, object]]:
    """The figures of each sampler.

    endpoint_error: mean square distance between its latents and those of `against`, from the same noise.
    frechet_distance: between the judge's features of its images and of true images of the test prompts.
    prompt_agreement: share of the requested attributes that the judge reads in the images, over all and by attribute.
    denoise_seconds_per_image, seconds_per_image: medians over batches; the second is from prompt to image.
    """
    asked = np.stack([caption.as_array() for caption in captions])
    truth = np.concatenate(results[against].latents)
    figures = {}
    for name, result in results.items():
        features, read = features_and_attributes(world, result)
        shares = agreement(read, asked, world.captions.values)
        figures[name] = {
            "endpoint_error": float(np.square(np.concatenate(result.latents) - truth).mean()),
            "frechet_distance": frechet_distance(Moments.from_features(features), world.true_features),
            "prompt_agreement": shares.pop("mean"),
            "prompt_agreement_by_attribute": shares,
            "denoise_seconds_per_image": float(np.median(result.denoise_seconds)) / BATCH,
            "seconds_per_image": float(np.median(result.path_seconds)) / BATCH,
        }
    return figures
