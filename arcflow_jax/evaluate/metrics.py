"""FID, pFID and CLIP score of a set of images, by the protocol of pi-Flow's evaluation.

FID is the Fréchet distance between Inception features of the images, scaled to 299 × 299, and those of a reference.
pFID is the same for their central crops, unscaled. The CLIP score is the mean cosine between image and prompt. There
are two references, which answer different questions and are never mixed: real images, and the teacher's own.

Only statistics of the images are kept, in a file beside the report:

    OUT.json        the figures
    OUT.npz         count, mean and scatter of what each metric measures, and what identifies the images. An
                    interrupted evaluation resumes from it, and another evaluation can use it as its reference
    OUT-real.npz    the same for a reference that was given as a folder; OUT-teacher.npz likewise
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.frechet import frechet_distance
from arcflow_jax.evaluate.image_sets import ImageSet
from arcflow_jax.evaluate.statistics import DISTANCES, Networks, Progress, Statistics, gather, reference
from arcflow_jax.parallel.processes import is_main
from arcflow_jax.parallel.together import from_first, writing_together
from arcflow_jax.storage.atomic import cannot_write
from arcflow_jax.storage.files import write_json

REFERENCES = ("real", "teacher")


def evaluate(
    images: ImageSet,
    references: Mapping[str, Path],
    out: Path,
    networks: Networks,
    progress: Progress = lambda activity, done, total: None,
) -> dict[str, Any]:
    """The figures of a set of images, which are also written to `out`.

    Args:
      images: the images to judge.
      references: what FID and pFID compare with, by name (one of `REFERENCES`): a folder of images, or a statistics
        file. Without references only the images' own statistics are gathered.
      out: a .json file. Statistics go beside it.
      networks: the networks of the wanted metrics.
      progress: called with the current activity, the number of images done, and of how many.

    Raises:
      UserError: on bad input. What was done until then is kept.
    """
    if out.suffix != ".json":
        raise UserError(f"the report {out} must be a .json file")
    distances = [metric for metric in DISTANCES if metric in networks.metrics]
    if references and not distances:
        raise UserError("a reference needs fid or pfid among the metrics, or leave it out")
    with writing_together(out):
        statistics, known = measured(images, references, out, networks, distances, progress)
        report = from_first(lambda: figures(images, statistics, known, networks, distances, progress))
        if is_main():
            with cannot_write(out):
                write_json(out, report)
    return report


def measured(
    images: ImageSet,
    references: Mapping[str, Path],
    out: Path,
    networks: Networks,
    distances: Sequence[str],
    progress: Progress,
) -> tuple[Statistics, dict[str, Statistics]]:
    """The statistics of the images, and of each reference; `distances` are the wanted metrics that have a reference.

    Several processes share the images. Only the first one gets the statistics.
    """
    known = {
        name: reference(
            source,
            distances,
            networks,
            out.with_name(f"{out.stem}-{name}.npz"),
            lambda _, done, total, name=name: progress(f"measuring the {name} images", done, total),
        )
        for name, source in references.items()
    }
    return gather(images, networks.metrics, networks, out.with_suffix(".npz"), progress), known


def figures(
    images: ImageSet,
    statistics: Statistics,
    known: Mapping[str, Statistics],
    networks: Networks,
    distances: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """What `evaluate` writes, from what `measured` has returned."""
    report: dict[str, Any] = {
        "images": images.identity,
        "references": {name: each.description["images"] for name, each in known.items()},
    }
    for metric in distances:
        progress(f"computing {metric}", images.count, images.count)
        own = statistics.moments[metric]
        report[metric] = {name: frechet_distance(own, each.moments[metric]) for name, each in known.items()}
    if "clip" in networks.metrics:
        cosines = statistics.moments["clip"]
        report["clip"] = {"score": float(cosines.mean[0]), "network": networks.clip}
        if cosines.count > 1:
            report["clip"]["standard_error"] = float(np.sqrt(cosines.covariance[0, 0] / cosines.count))
    report["notes"] = notes(networks, {"images": statistics, **known} if known else {}, distances)
    return report


def table(report: Mapping[str, Any]) -> str:
    """A report as text: a line per figure, and the notes."""
    lines = [f"{report['images']['count']} images"]
    for metric in DISTANCES:
        lines += [f"{metric} to the {name} images: {value:.3f}" for name, value in report.get(metric, {}).items()]
    if "clip" in report:
        lines.append(f"clip score: {report['clip']['score']:.4f}")
    return "\n".join([*lines, *report["notes"]])


def notes(networks: Networks, compared: Mapping[str, Statistics], distances: Sequence[str]) -> list[str]:
    """Why the figures cannot be compared with published ones, if they cannot."""
    found = []
    for name, statistics in compared.items():
        features = len(statistics.moments[distances[0]].mean)
        if statistics.count <= features:
            found.append(
                f"{name}: {statistics.count} images are few for {features} features: their covariance is singular, "
                "and the distance is biased upwards"
            )
    if compared and not networks.inception.published:
        found.append(
            "inception: this is not the network behind published figures: compare only with figures of the same network"
        )
    return found
