"""Compares samplers on the picture world: the same prompts and noises through each, timed side by side."""

# B pictures a batch, N tokens, C latent channels

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import track

from arcflow_jax.demo import world as pictures
from arcflow_jax.demo.judge import agreement, load_judge
from arcflow_jax.demo.world import Caption
from arcflow_jax.evaluate.frechet import Moments, frechet_distance
from arcflow_jax.pipeline import ArcFlowPipeline, Guided

BATCH = 16
SEED = 1  # of the evaluation's noises
REFERENCES = 8  # rendered pictures a prompt, that the Fréchet distance compares with


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A way to make pictures: a student or teacher in so many network calls."""

    pipeline: ArcFlowPipeline
    steps: int

    def __call__(self, noise: jax.Array, conditioning: object) -> jax.Array:
        return self.pipeline.denoise(noise, conditioning, self.steps)


@dataclasses.dataclass
class Results:
    """What one sampler made, and how long each batch of B took it."""

    latents: list[np.ndarray] = dataclasses.field(default_factory=list)  # [B, N, 4C]
    pixels: list[np.ndarray] = dataclasses.field(default_factory=list)  # [B, H, W, 3] uint8
    denoise_seconds: list[float] = dataclasses.field(default_factory=list)
    path_seconds: list[float] = dataclasses.field(default_factory=list)  # prompt to picture


def timed(call: Callable[[], object]) -> tuple[object, float]:
    start = time.perf_counter()
    value = jax.block_until_ready(call())
    return value, time.perf_counter() - start


def run_samplers(
    samplers: dict[str, Sampler], captions: Sequence[Caption], guidance: float, negative_prompt: str | None = None
) -> dict[str, Results]:
    """Every sampler on every caption, batch by batch in turn, so that all see the machine in the same state.

    Each compiles on a batch that is not counted.

    Args:
      guidance: scale that the guidance embedding is fed, or of the teacher's true guidance.
      negative_prompt: that true guidance leads the teacher away from; None for no such guidance.
    """
    results = {name: Results() for name in samplers}
    batches = [list(map(str, captions[i : i + BATCH])) for i in range(0, len(captions), BATCH)]
    shared = next(iter(samplers.values())).pipeline
    rows, columns = shared.grid()

    def prepare(prompts: list[str]) -> object:
        return shared.encode(prompts, guidance=guidance, rows=rows, columns=columns)

    for counted, indices in ((False, [0]), (True, track(range(len(batches)), "sampling   ", transient=True))):
        for index in indices:
            noise = shared.noise(SEED, len(batches[index]), rows, columns, first=index * BATCH)
            conditioning, encode_seconds = timed(lambda i=index: prepare(batches[i]))
            guided = conditioning
            if negative_prompt is not None:
                negative = prepare([negative_prompt] * len(batches[index]))
                guided = Guided(conditioning, negative, jnp.float32(guidance), norm_preserving=False)
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
    return results


def measure(results: dict[str, Results], captions: Sequence[Caption], against: str) -> dict[str, dict[str, object]]:
    """The figures of each sampler.

    endpoint_error: mean square distance of the latents to those of `against` from the same noise.
    frechet_distance: of the judge's features to those of rendered pictures of the same captions.
    prompt_agreement: share of the attributes asked for that the judge reads, of all and of each kind.
    denoise_seconds_per_image, seconds_per_image: medians over batches; the second from prompt to picture.
    """
    graphdef, judge = nnx.split(load_judge())

    @jax.jit
    def look(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, judge)
        return model(pixels)[0], model.read(pixels)

    def features_and_reading(batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        seen = [look(jnp.asarray(batch)) for batch in batches]
        return [np.concatenate(arrays) for arrays in zip(*seen, strict=True)]

    asked = np.stack([caption.as_array() for caption in captions])
    references = []
    for i in range(REFERENCES):
        references.append(pictures.render(jax.random.fold_in(jax.random.key(SEED), i), jnp.asarray(asked)))
    reference = Moments.of(features_and_reading(references)[0])
    truth = np.concatenate(results[against].latents)
    figures = {}
    for name, result in results.items():
        features, read = features_and_reading([batch / 127.5 - 1 for batch in result.pixels])
        shares = agreement(read, asked)
        figures[name] = {
            "endpoint_error": float(np.square(np.concatenate(result.latents) - truth).mean()),
            "frechet_distance": frechet_distance(Moments.of(features), reference),
            "prompt_agreement": shares.pop("mean"),
            "prompt_agreement_by_attribute": shares,
            "denoise_seconds_per_image": float(np.median(result.denoise_seconds)) / BATCH,
            "seconds_per_image": float(np.median(result.path_seconds)) / BATCH,
        }
    return figures
