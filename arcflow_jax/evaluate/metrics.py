"""FID, pFID and CLIP score of a set of pictures, by the protocol of pi-Flow's evaluation.

FID is the Fréchet distance of Inception's features to those of a reference, whole pictures scaled to 299 × 299; pFID
the same for their middles, unscaled; the CLIP score the mean cosine between picture and prompt. There are two
references, which answer different questions and are never mixed: real pictures, and the teacher's own.

Of the pictures only sums are kept, in a file beside the report:

    OUT.json        the figures
    OUT.npz         count, mean and scatter of what each metric looks at, and what the pictures are. An evaluation that
                    was interrupted goes on from there, and it stands for the pictures as a reference of another
    OUT-real.npz    the same of a reference that was given as a folder; OUT-teacher.npz likewise
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.frechet import frechet_distance
from arcflow_jax.evaluate.image_sets import PictureSet
from arcflow_jax.evaluate.statistics import DISTANCES, Networks, Progress, Statistics, gather, reference
from arcflow_jax.storage.files import write_json

REFERENCES = ("real", "teacher")


def evaluate(
    pictures: PictureSet,
    references: Mapping[str, Path],
    out: Path,
    networks: Networks,
    progress: Progress = lambda activity, done, total: None,
) -> dict[str, Any]:
    """The figures of a set of pictures, which are written to `out` as well.

    Args:
      pictures: to be judged.
      references: what FID and pFID compare with, of `REFERENCES` by name: a folder, or statistics. There may be none,
        and then only the pictures' own statistics are gathered.
      out: a .json file. Statistics lie beside it.
      networks: what looks at pictures, for the metrics that are wanted.
      progress: told what is going on, how many pictures are done, and of how many.

    Raises:
      UserError: on bad input; what was done until then is kept.
    """
    if out.suffix != ".json":
        raise UserError(f"the report {out} has to be a .json file")
    distances = [metric for metric in DISTANCES if metric in networks.metrics]
    if references and not distances:
        raise UserError("a reference is for fid and pfid, which are not among the metrics")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}") from None
    known = {
        name: reference(
            source,
            distances,
            networks,
            out.with_name(f"{out.stem}-{name}.npz"),
            lambda _, done, total, name=name: progress(f"looking at the {name} pictures", done, total),
        )
        for name, source in references.items()
    }
    statistics = gather(pictures, networks.metrics, networks, out.with_suffix(".npz"), progress)
    report: dict[str, Any] = {
        "pictures": pictures.of,
        "references": {name: each.description["pictures"] for name, each in known.items()},
    }
    for metric in distances:
        progress(f"computing {metric}", pictures.count, pictures.count)
        own = statistics.moments[metric]
        report[metric] = {name: frechet_distance(own, each.moments[metric]) for name, each in known.items()}
    if "clip" in networks.metrics:
        cosines = statistics.moments["clip"]
        report["clip"] = {"score": float(cosines.mean[0]), "network": networks.clip}
        if cosines.count > 1:
            report["clip"]["standard_error"] = float(np.sqrt(cosines.covariance[0, 0] / cosines.count))
    report["notes"] = notes(networks, {"pictures": statistics, **known} if known else {}, distances)
    write_json(out, report)
    return report


def table(report: Mapping[str, Any]) -> str:
    """The figures of a report, a line each, with what to mind about them."""
    lines = [f"{report['pictures']['pictures']} pictures"]
    for metric in DISTANCES:
        lines += [f"{metric} to the {name} pictures: {value:.3f}" for name, value in report.get(metric, {}).items()]
    if "clip" in report:
        lines.append(f"clip score: {report['clip']['score']:.4f}")
    return "\n".join([*lines, *report["notes"]])


def notes(networks: Networks, compared: Mapping[str, Statistics], distances: Sequence[str]) -> list[str]:
    """What keeps the figures from being comparable with published ones."""
    said = []
    for name, statistics in compared.items():
        features = len(statistics.moments[distances[0]].mean)
        if statistics.count <= features:
            said.append(
                f"{name}: {statistics.count} pictures are few for {features} features, their covariance is singular, "
                "and the distance biased upwards"
            )
    if compared and not networks.inception.published:
        said.append("inception: not the network of published figures, compare only with figures of the same one")
    return said
