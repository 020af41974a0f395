"""What each metric measures on a batch of images, with its network."""

# B images, F features

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.diversity import mean_pairwise_distance
from arcflow_jax.evaluate.features import CLIP, DINO, Clip, Dino, Inception, centre, image_network, resized
from arcflow_jax.evaluate.image_sets import ImageSet
from arcflow_jax.evaluate.retrieval import recall
from arcflow_jax.storage.files import digest

METRICS = ("fid", "pfid", "clip", "retrieval", "hps", "diversity")
DEFAULT = METRICS[:3]
DISTANCES = METRICS[:2]
WITH_CLIP = ("clip", "retrieval")
BATCH = 32  # images per call of a network

Progress = Callable[[str, int, int], None]  # current activity, items done, items in total


class Networks:
    """The networks of some metrics. Each is loaded at its first use.

    Args:
      metrics: names from `METRICS`.
      inception: see `Inception`.
      clip: the network of the CLIP score and of retrieval, see `Clip`.
      features: the network of diversity, see `image_network`.
      hps: the network of HPSv2: a CLIP model, see `Clip`.

    Raises:
      UserError: if hps is wanted without its network; as `Inception`.
    """

    def __init__(
        self,
        metrics: Sequence[str] = DEFAULT,
        inception: Path | None = None,
        clip: str = CLIP,
        features: str = DINO,
        hps: str | None = None,
    ):
        self.metrics = [metric for metric in METRICS if metric in metrics]
        self.inception = Inception(inception) if set(metrics) & set(DISTANCES) else None
        self.clip = clip if set(metrics) & set(WITH_CLIP) else None
        self.diversity = features if "diversity" in metrics else None
        self.hps = hps if "hps" in metrics else None
        if "hps" in metrics and hps is None:
            raise UserError("the metric hps needs its network: name a CLIP model with --hps")
        self._prompts: tuple[dict[str, int], np.ndarray] = {}, np.zeros((0, 0))

    @functools.cached_property
    def _clip(self) -> Clip:
        return Clip(self.clip)

    @functools.cached_property
    def _hps(self) -> Clip:
        return Clip(self.hps, whole=True)

    @functools.cached_property
    def _diversity(self) -> Clip | Dino:
        return image_network(self.diversity)

    def prepare(self, metrics: Sequence[str], images: ImageSet, progress: Progress) -> None:
        """Encodes the prompts of a set of images, if one of the metrics is retrieval. Raises UserError as `Clip`."""
        if "retrieval" not in metrics:
            return
        texts, encoded = list(dict.fromkeys(images.prompts)), []
        for first in range(0, len(texts), BATCH):
            progress("encoding prompts", first, len(texts))
            encoded.append(self._clip.prompts(texts[first : first + BATCH]))
        self._prompts = {text: i for i, text in enumerate(texts)}, np.concatenate(encoded).astype(np.float64)

    def features(
        self, metrics: Sequence[str], batch: Sequence[Image.Image], images: ImageSet
    ) -> dict[str, np.ndarray]:  # each [B, F]
        """What metrics measure on a batch from a set of images, which `prepare` knows.

        fid, pfid: Inception's features. clip, hps: the cosine between image and prompt. retrieval: see `recall`.
        diversity: of each image, the `mean_pairwise_distance` of its prompt's images; the batch has all of them.
        """
        found = {}
        for metric, prepare in (("fid", resized), ("pfid", centre)):
            if metric in metrics:
                found[metric] = self.inception(np.stack([prepare(image) for image in batch]))
        if set(metrics) & set(WITH_CLIP):
            prompts, seen = [images.prompt(image) for image in batch], self._clip.images(batch)
            if "clip" in metrics:
                found["clip"] = cosines(seen, self._clip.prompts(prompts))
            if "retrieval" in metrics:
                numbers, encoded = self._prompts
                found["retrieval"] = recall(seen, encoded, [numbers[prompt] for prompt in prompts])
        if "hps" in metrics:
            prompts = [images.prompt(image) for image in batch]
            found["hps"] = cosines(self._hps.images(batch), self._hps.prompts(prompts))
        if "diversity" in metrics:
            seen = self._diversity.images(batch)
            distances = mean_pairwise_distance(seen.reshape(-1, images.images_per_prompt, seen.shape[-1]))
            found["diversity"] = distances.repeat(images.images_per_prompt)[:, None]
        return found

    def description(self, metrics: Sequence[str], images: ImageSet) -> dict[str, Any]:
        """What statistics of metrics on a set of images depend on, JSON."""
        found = {
            "metrics": list(metrics),
            "images": images.identity,
            "inception": self.inception and self.inception.sha256,
            "clip": self.clip if set(metrics) & set(WITH_CLIP) else None,
        }
        if "hps" in metrics:
            found["hps"] = self.hps
        if "diversity" in metrics:
            found["diversity"] = {
                "network": self.diversity,
                "images_per_prompt": images.images_per_prompt,
                "prompts_sha256": prompts_digest(images),
            }
        return found


def prompts_digest(images: ImageSet) -> str:
    """SHA-256 of the prompts of a set of images, in whatever order they come."""
    return digest(sorted(set(images.prompts)))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # [B, 1]
    """The cosine of each pair of vectors of length 1, [B, F] both."""
    return (a * b).sum(-1, keepdims=True)
