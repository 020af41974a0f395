"""Pictures of a benchmark's prompts, laid out as its own scorer reads them.

GenEval (Ghosh et al. 2023), `evaluate_images.py OUT`:

    OUT/00000/metadata.jsonl       the N-th line of the benchmark's evaluation_metadata.jsonl
    OUT/00000/samples/0000.png …   four pictures by default

DPG-Bench (Hu et al. 2024), `dist_eval.sh OUT SIDE`, SIDE being that of one picture in pixels:

    OUT/NAME.png                   four pictures in two rows, one for each NAME.txt of the benchmark's prompts

What is there stands: a prompt's pictures appear together, so an export that was interrupted goes on from there.
OUT.json, beside the folder that the scorer reads, says what they are of.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from arcflow_jax.data.output import contact_sheet, make_folder, save_picture
from arcflow_jax.data.prompts import json_records, read_prompts, text_of
from arcflow_jax.errors import UserError
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.files import digest, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt of a benchmark.

    Attributes:
      name: of its file or folder.
      prompt: what its pictures should show.
      record: what else the benchmark says of it.
    """

    name: str
    prompt: str
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


class Layout(Protocol):
    """How a benchmark keeps prompts and pictures."""

    def read(self, source: Path) -> list[Item]:
        """The prompts as the benchmark publishes them. Raises UserError if they are not there."""

    def path(self, out: Path, item: Item) -> Path:
        """What is there if a prompt's pictures are."""

    def write(self, out: Path, item: Item, images: Sequence[Image.Image]) -> None:
        """A prompt's pictures, which appear together. Raises UserError if they cannot be written."""


class GenEval:
    def read(self, source: Path) -> list[Item]:
        if not source.is_file():
            raise UserError(f"{source} is not there: GenEval's prompts are in its prompts/evaluation_metadata.jsonl")
        items = []
        for where, record in json_records(source):
            if not (prompt := (text_of(where, record, "prompt") or "").strip()):
                raise UserError(f"{where}: the prompt is empty")
            items.append(Item(f"{len(items):05d}", prompt, record))
        return items

    def path(self, out: Path, item: Item) -> Path:
        return out / item.name

    def write(self, out: Path, item: Item, images: Sequence[Image.Image]) -> None:
        aside = out / f".{item.name}"  # the scorer reads folders whose names are numbers
        shutil.rmtree(aside, ignore_errors=True)
        make_folder(aside / "samples")
        for i, image in enumerate(images):
            save_picture(image, aside / "samples" / f"{i:04d}.png")
        try:
            (aside / "metadata.jsonl").write_text(json.dumps(item.record) + "\n")
            aside.rename(self.path(out, item))
        except OSError as error:
            raise UserError(f"cannot write pictures to {out}: {error.strerror}") from None


class DpgBench:
    def read(self, source: Path) -> list[Item]:
        files = sorted(source.glob("*.txt"))
        if not files:
            raise UserError(f"{source} is not a folder with .txt files: DPG-Bench's prompts are in dpg_bench/prompts")
        items = []
        for file in files:
            if "." in file.stem:
                raise UserError(
                    f"{file}: the scorer finds pictures by their names up to the first dot: rename the file"
                )
            items.append(Item(file.stem, " ".join(read_prompts(file).texts)))
        return items

    def path(self, out: Path, item: Item) -> Path:
        return out / f"{item.name}.png"

    def write(self, out: Path, item: Item, images: Sequence[Image.Image]) -> None:
        if len(images) != 4 or images[0].width != images[0].height:
            raise UserError("DPG-Bench's scorer reads four square pictures a prompt")
        sheet = contact_sheet(images, columns=2, gap=0)
        sheet.info = images[0].info
        save_picture(sheet, self.path(out, item))


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
    """Makes the pictures of a benchmark that are not there yet. Picture j of prompt i starts from noise i · images + j.

    Args:
      pipeline: makes them.
      benchmark: of `LAYOUTS`.
      items: its prompts, as its layout reads them.
      out: directory for the pictures.
      images: a prompt.
      batch_size: pictures made at a time, across prompts, which changes nothing about them.
      progress: told what is going on, how many pictures are done, and of how many.
      settings: of `ArcFlowPipeline.settings`.

    Returns:
      How many pictures there are.

    Raises:
      UserError: on bad input, if there are pictures of something else, or they cannot be written.
    """
    layout = LAYOUTS[benchmark]
    made_with = pipeline.described(**settings)
    if benchmark == "dpg-bench" and (images != 4 or made_with["height"] != made_with["width"]):
        raise UserError("DPG-Bench's scorer reads four square pictures a prompt")
    description = {
        "benchmark": benchmark,
        "prompts": len(items),
        "prompts_sha256": digest(dataclasses.astuple(item) for item in items),
        "images": images,
        **made_with,
    }
    make_folder(out)
    beside = out.with_name(f"{out.name}.json")
    there = read_json(beside) if beside.is_file() else {} if any(out.iterdir()) else description
    if there != description:
        differing = [name for name in {**there, **description} if there.get(name) != description.get(name)]
        raise UserError(
            f"{out} holds pictures of something else (their {', '.join(differing)} differ): choose another --out, or "
            f"delete it and {beside.name}"
        )
    write_json(beside, description)
    missing = [i for i, item in enumerate(items) if not layout.path(out, item).exists()]
    # Prompts that follow one another are made in one go; usually all that are missing do
    for _, run in itertools.groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
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
    return len(items) * images
