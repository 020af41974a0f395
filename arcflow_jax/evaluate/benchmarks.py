"""Images for a benchmark's prompts, laid out for the benchmark's own scorer.

GenEval (Ghosh et al. 2023), `evaluate_images.py OUT`:

    OUT/00000/metadata.jsonl       line N of the benchmark's evaluation_metadata.jsonl
    OUT/00000/samples/0000.png …   four images by default

DPG-Bench (Hu et al. 2024), `dist_eval.sh OUT SIDE`, where SIDE is the size of one image in pixels:

    OUT/NAME.png                   four images in two rows, for each NAME.txt of the benchmark's prompts

All images of a prompt appear together, so an interrupted export resumes with the prompts that have none. Several
processes share these prompts. OUT.json, beside the folder that the scorer reads, records how the images were made.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from arcflow_jax import schema
from arcflow_jax.data.output import contact_sheet, save_image
from arcflow_jax.data.prompts import read_prompts, text_of
from arcflow_jax.errors import UserError
from arcflow_jax.parallel.together import check_directory, check_same, from_first, own_share, writing_together
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.schema import Batch
from arcflow_jax.storage.atomic import cannot_write, make_directory, whole_directory
from arcflow_jax.storage.files import digest, json_records, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt of a benchmark.

    Attributes:
      name: name of its file or folder.
      prompt: what its images should show.
      record: the benchmark's record of this prompt, for its scorer.
    """

    name: str
    prompt: str
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


class Layout(Protocol):
    """How a benchmark stores prompts and images."""

    def read(self, source: Path) -> list[Item]:
        """The prompts in the benchmark's published format. Raises UserError if there are none."""

    def path(self, out: Path, item: Item) -> Path:
        """The path that exists once a prompt's images do."""

    def write(self, out: Path, item: Item, images: Sequence[Image.Image]) -> None:
        """Writes a prompt's images, which appear together. Raises UserError if they cannot be written."""


class GenEval:
    def read(self, source: Path) -> list[Item]:
        if not source.is_file():
            raise UserError(f"{source} does not exist: GenEval's prompts are in its prompts/evaluation_metadata.jsonl")
        items = []
        for where, record in json_records(source):
            if not (prompt := (text_of(where, record, "prompt") or "").strip()):
                raise UserError(f"{where}: the prompt is empty")
            items.append(Item(f"{len(items):05d}", prompt, record))
        return items

    def path(self, out: Path, item: Item) -> Path:
        return out / item.name

    def write(self, out: Path, item: Item, images: Sequence[Image.Image]) -> None:
        # The scorer reads only folders whose names are numbers, so not the one that is being written
        with whole_directory(self.path(out, item), needed=0) as aside:
            make_directory(aside / "samples")
            for i, image in enumerate(images):
                save_image(image, aside / "samples" / f"{i:04d}.png")
            (aside / "metadata.jsonl").write_text(json.dumps(item.record) + "\n")


class DpgBench:
    def read(self, source: Path) -> list[Item]:
        files = sorted(source.glob("*.txt"))
        if not files:
            raise UserError(f"{source} is not a folder with .txt files: DPG-Bench's prompts are in dpg_bench/prompts")
        items = []
        for file in files:
            if "." in file.stem:
                raise UserError(
                    f"{file}: the scorer matches images by their names up to the first dot: rename the file"
                )
            items.append(Item(file.stem, " ".join(read_prompts(file).texts)))
        return items

    def path(self, out: Path, item: Item) -> Path:
        return out / f"{item.name}.png"

    def write(self, out: Path, item: Item, images: Sequence[Image.Image]) -> None:
        if len(images) != 4 or images[0].width != images[0].height:
            raise UserError("DPG-Bench's scorer reads four square images per prompt")
        sheet = contact_sheet(images, columns=2, gap=0)
        sheet.info = images[0].info
        save_image(sheet, self.path(out, item))


LAYOUTS: dict[str, Layout] = {"geneval": GenEval(), "dpg-bench": DpgBench()}


def export(
    pipeline: ArcFlowPipeline,
    benchmark: str,
    items: Sequence[Item],
    out: Path,
    images: int = 4,
    batch_size: int | None = None,
    progress: Callable[[str, int, int], None] = lambda activity, done, total: None,
    **settings: Any,
) -> int:
    """Makes a benchmark's missing images. Image j of prompt i starts from the seed's noise number i · images + j.

    Args:
      pipeline: makes the images.
      benchmark: a name from `LAYOUTS`.
      items: the prompts, as the benchmark's layout reads them.
      out: directory for the images.
      images: images per prompt.
      batch_size: images per call of the sampler, across prompts; does not change the images.
      progress: called with the current activity, the number of images done, and of how many.
      settings: keyword arguments of `ArcFlowPipeline.settings`.

    Returns:
      The number of images.

    Raises:
      UserError: on bad input, if `out` contains other images, or images cannot be written.
    """
    layout, images = LAYOUTS[benchmark], schema.converted(Batch, images, "images")
    made_with = pipeline.described(**settings)
    if benchmark == "dpg-bench" and (images != 4 or made_with["height"] != made_with["width"]):
        raise UserError("DPG-Bench's scorer reads four square images per prompt")
    description = {
        "benchmark": benchmark,
        "prompts": len(items),
        "prompts_sha256": digest(dataclasses.astuple(item) for item in items),
        "images": images,
        **made_with,
    }
    check_same({"the prompts, the weights or the options": description})
    with writing_together(out):
        missing = from_first(lambda: begin(layout, items, out, description))
        check_directory(out)
        own = [missing[i] for i in own_share(len(missing))]
        make_images(layout, pipeline, items, own, out, images, batch_size, progress, settings)
    return len(items) * images


def begin(layout: Layout, items: Sequence[Item], out: Path, description: dict[str, Any]) -> list[int]:
    """Makes `out`, and records beside it how its images are made. Returns the numbers of the prompts that have none.

    Raises UserError if images that are there were made otherwise.
    """
    make_directory(out)
    record = out.with_name(f"{out.name}.json")
    found = read_json(record) if record.is_file() else {} if any(out.iterdir()) else description
    if found != description:
        differing = [name for name in {**found, **description} if found.get(name) != description.get(name)]
        raise UserError(
            f"{out} contains other images, with different {', '.join(differing)}: choose another --out, or delete it "
            f"and {record.name}"
        )
    with cannot_write(record):
        write_json(record, description)
    return [i for i, item in enumerate(items) if not layout.path(out, item).exists()]


def make_images(
    layout: Layout,
    pipeline: ArcFlowPipeline,
    items: Sequence[Item],
    numbers: Sequence[int],
    out: Path,
    images: int,
    batch_size: int | None,
    progress: Callable[[str, int, int], None],
    settings: dict[str, Any],
) -> None:
    """Makes the images of the prompts with these numbers (see `export`)."""
    # Consecutive prompts share a stream; usually all the missing ones are consecutive
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        wanted = [i for _, i in run]
        stream = pipeline.stream(
            [items[i].prompt for i in wanted],
            num_images_per_prompt=images,
            first=wanted[0] * images,
            batch_size=batch_size,
            progress=lambda activity, done, first=wanted[0]: progress(
                activity, first * images + done, len(items) * images
            ),
            **settings,
        )
        for i in wanted:
            layout.write(out, items[i], list(itertools.islice(stream, images)))
