"""What is kept of a set of images: mean and scatter of each metric's features, in a file that an evaluation resumes."""

# B images, F features

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from arcflow_jax import schema
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.evaluate.frechet import Moments
from arcflow_jax.evaluate.image_sets import Folder, ImageSet
from arcflow_jax.evaluate.measures import BATCH, DISTANCES, METRICS, Networks, Progress, prompts_digest
from arcflow_jax.parallel.processes import is_main, process_index
from arcflow_jax.parallel.together import check_same, from_first, gathered, writing_together
from arcflow_jax.schema import SHA256, Batch, Count
from arcflow_jax.storage.atomic import cannot_write, write_file
from arcflow_jax.storage.files import file_size, parse_json

LARGEST = 2**28  # bytes of a statistics file, or of an array in it: twice the scatter matrix of 4096 features
SAVE_SECONDS = 300  # between saves
FORMAT = "arcflow_jax statistics 1"


@dataclasses.dataclass(frozen=True)
class ImagesDescription:
    """What every `ImageSet.identity` has."""

    count: Count


@dataclasses.dataclass(frozen=True)
class DiversityDescription:
    """What diversity depends on beside the images."""

    network: str
    images_per_prompt: Batch
    prompts_sha256: SHA256


@dataclasses.dataclass(frozen=True)
class Description:
    """The types of a description."""

    metrics: tuple[Literal["fid", "pfid", "clip", "retrieval", "hps", "diversity"], ...]
    images: ImagesDescription
    inception: SHA256 | None = None
    clip: str | None = None
    hps: str | None = None
    diversity: DiversityDescription | None = None

    def __post_init__(self):
        if "diversity" in self.metrics and self.diversity is None:
            raise UserError("diversity is missing")


@dataclasses.dataclass
class Statistics:
    """What is kept of a set of images.

    Attributes:
      description: what was measured, as JSON: `metrics`, their names; `images`, see `ImageSet.identity`; `inception`,
        SHA-256 of the network; `clip` and `hps`, where the networks came from; `diversity`, see `DiversityDescription`.
      moments: of each metric's features, by the metric's name. All are of the same images.
    """

    description: dict[str, Any]
    moments: dict[str, Moments]

    @property
    def count(self) -> int:
        return next(iter(self.moments.values())).count if self.moments else 0

    @property
    def complete(self) -> bool:
        return self.count == self.description["images"]["count"]

    def add(self, count: int, features: Mapping[str, bytes]) -> None:
        """Adds so many images; `features` has each metric's features of them, [B, F] float32."""
        rows = {metric: np.frombuffer(data, np.float32).reshape(count, -1) for metric, data in features.items()}
        new, before = {metric: Moments.from_features(x) for metric, x in rows.items()}, self.moments
        self.moments = {metric: before[metric] + x for metric, x in new.items()} if before else new

    def write(self, file: Path) -> None:
        """Writes a file, which appears whole or not at all. Raises UserError if it cannot be written."""
        arrays = {
            f"{metric}_{field}": value
            for metric, moments in self.moments.items()
            for field, value in vars(moments).items()
        }
        encoded = io.BytesIO()
        np.savez(encoded, format=FORMAT, description=json.dumps(self.description), **arrays)
        with cannot_write(file):
            write_file(file, encoded.getvalue())

    @classmethod
    def read(cls, file: Path) -> Statistics:
        """The statistics in a file. Raises UserError if there are none, or they are damaged."""
        file_size(file, LARGEST)
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                if any(part.file_size > LARGEST for part in arrays.zip.infolist()):
                    raise ValueError(f"an array has more than {LARGEST} bytes")
                stored = dict(arrays)
            if "format" not in stored:
                raise ValueError("it has no format")
        except Exception as error:  # NumPy and zipfile raise all kinds of errors
            raise UserError(f"{file} does not contain statistics of images: {one_line(error)}") from None
        if str(stored["format"]) != FORMAT:
            raise UserError(f"{file} is not in the format {FORMAT!r}, which arcflow evaluate metrics writes")
        where = f"{file}, description"
        description = parse_json(str(stored.get("description")), where)
        if "pictures" in description:  # as version 0.1 wrote it
            images = schema.nested(description, "pictures")
            del description["pictures"]
            description["images"] = {"count" if name == "pictures" else name: x for name, x in images.items()}
        known = schema.parse(Description, description, where)
        moments = {name: moments_of(stored, name, file) for name in known.metrics if f"{name}_count" in stored}
        counts = {each.count for each in moments.values()}
        if missing := [name for name in known.metrics if name not in moments]:
            raise UserError(f"{file} is damaged: it lacks the moments of {', '.join(missing)}")
        others = [name for name in METRICS if f"{name}_count" in stored and name not in moments]
        if others or len(counts) > 1 or max(counts, default=0) > known.images.count:
            raise UserError(f"{file} is damaged: its metrics are not of the same images")
        return cls(description, moments)


def moments_of(arrays: Mapping[str, np.ndarray], metric: str, file: Path) -> Moments:
    """The moments of one metric in a file's arrays. Raises UserError unless their shapes and values fit together."""
    count, mean, scatter = (
        np.asarray(arrays.get(f"{metric}_{field.name}", "")) for field in dataclasses.fields(Moments)
    )
    numbers = all(np.issubdtype(x.dtype, np.number) and np.isfinite(x).all() for x in (count, mean, scatter))
    whole = np.issubdtype(count.dtype, np.integer) and not count.ndim
    if not numbers or not whole or count < 1 or mean.ndim != 1 or scatter.shape != 2 * mean.shape:
        raise UserError(f"{file} is damaged: its count, mean and scatter of {metric} are not those of any images")
    return Moments(int(count), mean, scatter)


def gather(images: ImageSet, metrics: Sequence[str], networks: Networks, file: Path, progress: Progress) -> Statistics:
    """The statistics of a set of images, written to `file`. Resumes from what the file already holds.

    Raises:
      UserError: if the file holds statistics of other images, metrics or networks, another process writes it, or an
        image cannot be measured.
    """
    with writing_together(file):
        return complete(images, metrics, networks, file, progress)


def complete(
    images: ImageSet, metrics: Sequence[str], networks: Networks, file: Path, progress: Progress
) -> Statistics:
    """`gather`, by the one writer of `file`. Of several processes, only the first gets all statistics."""
    description, batch = networks.description(metrics, images), batch_size(metrics, images)
    size = math.lcm(batch, images.together)  # of what a process measures at a time
    check_same({"the images, the networks or the options": [description, size]})
    statistics = begun(description, file) if is_main() else Statistics(description, {})
    first, saved, saved_count = from_first(lambda: statistics.count), time.monotonic(), statistics.count
    if first < images.count:
        networks.prepare(metrics, images, progress)
    try:
        while first < images.count:
            own = range(first, images.count)[size * process_index() :][:size]
            found = measured(images, own, batch, metrics, networks, progress)
            for count, features in itertools.chain(*gathered(found)):
                first += count
                if is_main():
                    statistics.add(count, features)
            if is_main() and time.monotonic() - saved > SAVE_SECONDS:
                statistics.write(file)
                saved, saved_count = time.monotonic(), statistics.count
    finally:
        if is_main() and statistics.count > saved_count:
            statistics.write(file)
    return statistics


def batch_size(metrics: Sequence[str], images: ImageSet) -> int:
    """How many images are measured together; for diversity, all images of some prompts."""
    together = images.images_per_prompt if "diversity" in metrics else 1
    return max(BATCH // together, 1) * together


def begun(description: dict[str, Any], file: Path) -> Statistics:
    """What a file already holds of the statistics with this description. Raises UserError if it holds others."""
    statistics = Statistics.read(file) if file.is_file() else Statistics(description, {})
    if statistics.description != description:
        found = {**statistics.description, **statistics.description["images"]}
        wanted = {**description, **description["images"]}
        names = {**found, **wanted}.keys() - {"images"}
        differing = sorted(name for name in names if found.get(name) != wanted.get(name))
        raise UserError(
            f"{file} has other statistics, with different {', '.join(differing)}: delete it or choose another --out"
        )
    return statistics


def measured(
    images: ImageSet, numbers: range, size: int, metrics: Sequence[str], networks: Networks, progress: Progress
) -> list[tuple[int, dict[str, bytes]]]:
    """What the metrics measure on some images, `size` at a time: their number, each metric's features, float32."""
    stream, found = images.stream(numbers.start, numbers.stop), []
    for first in numbers[::size]:
        progress("measuring", first, images.count)
        batch = list(itertools.islice(stream, size))
        features = networks.features(metrics, batch, images)
        found.append((len(batch), {metric: x.astype(np.float32).tobytes() for metric, x in features.items()}))
    return found


def reference(
    source: Path, judged: ImageSet, metrics: Sequence[str], networks: Networks, file: Path, progress: Progress
) -> Statistics:
    """The statistics of a reference: read from a .npz file, or gathered from a folder of images and written to `file`.

    Raises:
      UserError: if there are none, they lack a metric, come from another network, or are incomplete; for diversity, if
        they are of other prompts than the images to judge.
    """
    if source.suffix != ".npz":
        images = Folder(source, by_prompt="diversity" in metrics)
        if "diversity" in metrics:
            check_prompts(source, networks.description(metrics, images), judged)
        return gather(images, metrics, networks, file, progress)
    statistics = Statistics.read(source)
    if missing := [metric for metric in metrics if metric not in statistics.moments]:
        raise UserError(f"{source} has no statistics for {' and '.join(missing)}, only {', '.join(statistics.moments)}")
    if set(metrics) & set(DISTANCES) and statistics.description["inception"] != networks.inception.sha256:
        raise UserError(f"{source} was made with another Inception network than {networks.inception.file}")
    if "diversity" in metrics:
        if (network := statistics.description["diversity"]["network"]) != networks.diversity:
            raise UserError(f"{source} has the diversity of features of {network}: name it with --features")
        check_prompts(source, statistics.description, judged)
    if not statistics.complete:
        raise UserError(
            f"{source} covers {statistics.count} of {statistics.description['images']['count']} images: the "
            "evaluation that writes it was interrupted, so run it again"
        )
    return statistics


def check_prompts(source: Path, description: Mapping[str, Any], judged: ImageSet) -> None:
    """Raises UserError unless a reference with this description shows the prompts of the images to judge."""
    if description["diversity"]["prompts_sha256"] != prompts_digest(judged):
        raise UserError(
            f"{source} shows other prompts than the images to judge: diversity compares images of the same prompts"
        )
