"""The figures of a set of images: distances to references, agreement with prompts, diversity.

FID is the Fréchet distance between Inception features of the images, scaled to 299 × 299, and those of a reference.
pFID is the same for their central crops, unscaled. The CLIP score is the mean cosine between image and prompt. These
three follow the protocol of pi-Flow's evaluation. Retrieval is the share of images whose own prompt is the nearest of
all prompts, or among the five nearest, by CLIP. HPS (Wu et al. 2023) is 100 times the mean cosine of a CLIP model that
was trained on human preferences. Diversity is the mean distance, 1 − cosine of features, over the pairs of a prompt's
images: a student that has lost modes has a lower one than its teacher. There are two references, which answer different
questions and are never mixed: real images, and the teacher's own.

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
from arcflow_jax.evaluate.frechet import Moments, frechet_distance
from arcflow_jax.evaluate.image_sets import ImageSet
from arcflow_jax.evaluate.measures import DISTANCES, Networks, Progress
from arcflow_jax.evaluate.retrieval import RANKS
from arcflow_jax.evaluate.statistics import Statistics, gather, reference
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
      references: what FID, pFID and diversity compare with, by name (one of `REFERENCES`): a folder of images, or a
        statistics file. Diversity compares with the teacher's only. Without references only the images' own statistics
        are gathered.
      out: a .json file. Statistics go beside it.
      networks: the networks of the wanted metrics.
      progress: called with the current activity, the number of images done, and of how many.

    Raises:
      UserError: on bad input. What was done until then is kept.
    """
    if out.suffix != ".json":
        raise UserError(f"the report {out} must be a .json file")
    for name in references:
        if not compared(networks, name):
            also = ", or diversity," if name == "teacher" else ""
            raise UserError(f"a reference needs fid or pfid{also} among the metrics, or leave it out")
    with writing_together(out):
        statistics, known = measured(images, references, out, networks, progress)
        report = from_first(lambda: figures(images, statistics, known, networks, progress))
        if is_main():
            with cannot_write(out):
                write_json(out, report)
    return report


def compared(networks: Networks, name: str) -> list[str]:
    """The wanted metrics that compare with the reference of this name."""
    return [m for m in networks.metrics if m in DISTANCES or (m == "diversity" and name == "teacher")]


def measured(
    images: ImageSet, references: Mapping[str, Path], out: Path, networks: Networks, progress: Progress
) -> tuple[Statistics, dict[str, Statistics]]:
    """The statistics of the images, and of each reference.

    Several processes share the images. Only the first one gets the statistics.
    """
    known = {
        name: reference(
            source,
            images,
            compared(networks, name),
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
    progress: Progress,
) -> dict[str, Any]:
    """What `evaluate` writes, from what `measured` has returned."""
    report: dict[str, Any] = {
        "images": images.identity,
        "references": {name: each.description["images"] for name, each in known.items()},
    }
    distances = [metric for metric in networks.metrics if metric in DISTANCES]
    for metric in distances:
        progress(f"computing {metric}", images.count, images.count)
        own = statistics.moments[metric]
        report[metric] = {name: frechet_distance(own, each.moments[metric]) for name, each in known.items()}
    moments = statistics.moments
    if "clip" in networks.metrics:
        report["clip"] = mean_and_error(moments["clip"]) | {"network": networks.clip}
    if "retrieval" in networks.metrics:
        report["retrieval"] = {f"recall_at_{k}": mean_and_error(moments["retrieval"], i) for i, k in enumerate(RANKS)}
        report["retrieval"] |= {"prompts": len(set(images.prompts)), "network": networks.clip}
    if "hps" in networks.metrics:
        report["hps"] = mean_and_error(moments["hps"], scale=100) | {"network": networks.hps}
    if "diversity" in networks.metrics:
        report["diversity"] = diversity(statistics, known.get("teacher"))
    report["notes"] = notes(networks, {"images": statistics, **known} if known and distances else {}, distances)
    return report


def mean_and_error(values: Moments, column: int = 0, scale: float = 1, repeated: int = 1) -> dict[str, float]:
    """The mean of a column times `scale`, with its standard error. Each value stands there `repeated` times."""
    count = values.count // repeated
    found = {"score": scale * float(values.mean[column])}
    if count > 1:
        variance = values.scatter[column, column] / repeated / (count - 1)
        found["standard_error"] = scale * float(np.sqrt(variance / count))
    return found


def diversity(own: Statistics, teacher: Statistics | None) -> dict[str, Any]:
    """The figures of diversity; `relative` is the mean over the teacher's, None if that is 0."""
    description = own.description["diversity"]
    found = mean_and_error(own.moments["diversity"], repeated=description["images_per_prompt"])
    found |= {"images_per_prompt": description["images_per_prompt"], "network": description["network"]}
    if teacher is None:
        return found
    mean = float(teacher.moments["diversity"].mean[0])
    return found | {"teacher": mean, "relative": found["score"] / mean if mean else None}


def table(report: Mapping[str, Any]) -> str:
    """A report as text: a line per figure, and the notes."""
    lines = [f"{report['images']['count']} images"]
    for metric in DISTANCES:
        lines += [f"{metric} to the {name} images: {value:.3f}" for name, value in report.get(metric, {}).items()]
    if "clip" in report:
        lines.append(f"clip score: {report['clip']['score']:.4f}")
    if "retrieval" in report:
        for k in RANKS:
            share, among = report["retrieval"][f"recall_at_{k}"]["score"], report["retrieval"]["prompts"]
            lines.append(f"recall at {k} among {among} prompts: {100 * share:.2f} %")
    if "hps" in report:
        lines.append(f"hps: {report['hps']['score']:.2f}")
    if "diversity" in report:
        found = report["diversity"]
        relative = found.get("relative")
        of_teacher = "" if relative is None else f", {relative:.4f} of the teacher's"
        lines.append(f"diversity: {found['score']:.4f}{of_teacher}")
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
