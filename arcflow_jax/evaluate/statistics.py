"""What is kept of a set of pictures: mean and scatter of what each metric looks at, in a file that goes on growing."""

# B pictures, F features

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.evaluate.features import CLIP, Clip, Inception, centre, resized
from arcflow_jax.evaluate.frechet import Moments
from arcflow_jax.evaluate.image_sets import Folder, PictureSet

METRICS = ("fid", "pfid", "clip")
DISTANCES = METRICS[:2]
BATCH = 32  # pictures that a network looks at together
SAVE_SECONDS = 300
FORMAT = "arcflow_jax statistics 1"

Progress = Callable[[str, int, int], None]  # what is going on, how many pictures are done, of how many


@dataclasses.dataclass
class Statistics:
    """What is kept of a set of pictures.

    Attributes:
      description: what it is of, as JSON takes it: `metrics`, by name; `pictures`, see `PictureSet.of`; `inception`,
        SHA-256 of the network; `clip`, its source.
      moments: of what each metric looks at, by its name; of as many pictures for one as for the other.
    """

    description: dict[str, Any]
    moments: dict[str, Moments]

    @property
    def count(self) -> int:
        return next(iter(self.moments.values())).count if self.moments else 0

    @property
    def complete(self) -> bool:
        return self.count == self.description["pictures"]["pictures"]

    def write(self, file: Path) -> None:
        """The file appears whole or not at all. Raises UserError if it cannot be written."""
        arrays = {
            f"{metric}_{field}": value
            for metric, moments in self.moments.items()
            for field, value in vars(moments).items()
        }
        aside = file.with_name(f"{file.name}.tmp")
        try:
            with aside.open("wb") as out:
                np.savez(out, format=FORMAT, description=json.dumps(self.description), **arrays)
            os.replace(aside, file)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from None
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def read(cls, file: Path) -> Statistics:
        """Raises UserError if there are none, or they are damaged."""
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if str(arrays["format"]) != FORMAT:
                    raise UserError(f"{file} does not hold {FORMAT}: arcflow evaluate metrics writes them")
                description = json.loads(str(arrays["description"]))
                fields = [field.name for field in dataclasses.fields(Moments)]
                moments = {
                    metric: Moments(*(arrays[f"{metric}_{field}"] for field in fields))
                    for metric in description["metrics"]
                    if f"{metric}_count" in arrays
                }
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} does not hold statistics of pictures: {one_line(error)}") from None
        for each in moments.values():
            each.count = int(each.count)
        return cls(description, moments)


class Networks:
    """What looks at pictures for some metrics; each is loaded when it first has something to look at.

    Args:
      metrics: of `METRICS`.
      inception: see `Inception`.
      clip: see `Clip`.
    """

    def __init__(self, metrics: Sequence[str] = METRICS, inception: Path | None = None, clip: str = CLIP):
        self.metrics = [metric for metric in METRICS if metric in metrics]
        self.inception = Inception(inception) if set(metrics) & set(DISTANCES) else None
        self.clip = clip if "clip" in metrics else None
        self._clip: Clip | None = None

    def look(self, metric: str, images: Sequence[Image.Image], pictures: PictureSet) -> np.ndarray:  # [B, F]
        """What a metric takes from pictures of a set."""
        if metric == "clip":
            self._clip = self._clip or Clip(self.clip)
            return self._clip(images, [pictures.prompt(image) for image in images])
        see = {"fid": resized, "pfid": centre}[metric]
        return self.inception(np.stack([see(image) for image in images]))

    def description(self, metrics: Sequence[str]) -> dict[str, Any]:
        return {
            "metrics": list(metrics),
            "inception": self.inception and self.inception.sha256,
            "clip": self.clip if "clip" in metrics else None,
        }


def gather(
    pictures: PictureSet, metrics: Sequence[str], networks: Networks, file: Path, progress: Progress
) -> Statistics:
    """The statistics of a set of pictures, going on from those in `file`, which holds them afterwards.

    Raises:
      UserError: if the file has statistics of something else, a picture cannot be looked at, or the like.
    """
    description = {**networks.description(metrics), "pictures": pictures.of}
    statistics = Statistics.read(file) if file.is_file() else Statistics(description, {})
    if statistics.description != description:
        there = {**statistics.description, **statistics.description["pictures"]}
        wanted = {**description, **pictures.of}
        differing = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
        raise UserError(
            f"{file} holds statistics of something else (its {', '.join(differing)} differ): delete it, or choose "
            "another --out"
        )
    images = pictures.stream(statistics.count)
    saved, at = time.monotonic(), statistics.count
    try:
        while not statistics.complete:
            progress("looking", statistics.count, pictures.count)
            batch = list(itertools.islice(images, BATCH))
            seen = {metric: Moments.of(networks.look(metric, batch, pictures)) for metric in metrics}
            so_far = statistics.moments
            statistics.moments = {metric: so_far[metric] + new if so_far else new for metric, new in seen.items()}
            if time.monotonic() - saved > SAVE_SECONDS:
                statistics.write(file)
                saved, at = time.monotonic(), statistics.count
    finally:
        if statistics.count > at:
            statistics.write(file)
    return statistics


def reference(source: Path, metrics: Sequence[str], networks: Networks, file: Path, progress: Progress) -> Statistics:
    """The statistics of a reference: a file of them, or a folder of pictures, which then are in `file`.

    Raises:
      UserError: if there are none, or they are of other metrics, of another network or incomplete.
    """
    if source.suffix != ".npz":
        return gather(Folder(source), metrics, networks, file, progress)
    statistics = Statistics.read(source)
    if missing := [metric for metric in metrics if metric not in statistics.moments]:
        raise UserError(f"{source} has no statistics for {' and '.join(missing)}")
    if statistics.description["inception"] != networks.inception.sha256:
        raise UserError(f"{source} is of another Inception network than {networks.inception.file}")
    if not statistics.complete:
        raise UserError(
            f"{source} is of {statistics.count} of {statistics.description['pictures']['pictures']} pictures: the "
            "evaluation that writes it was interrupted, run it again"
        )
    return statistics
