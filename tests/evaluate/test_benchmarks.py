"""Images laid out for the scorers of GenEval and DPG-Bench, read here as the scorers read them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_jax.errors import UserError
from arcflow_jax.evaluate import benchmarks
from arcflow_jax.evaluate.benchmarks import LAYOUTS
from tests.helpers.command_line import assert_refused, run

SIDE = 8


class Painter:
    """A fake pipeline: the colour of an image encodes its number and prompt."""

    def __init__(self, stops_at: int | None = None):
        self.stops_at = stops_at
        self.asked: list[tuple[int, int]] = []

    def described(self, height: int = SIDE, width: int = SIDE, seed: int = 0) -> dict:
        return {"height": height, "width": width, "seed": seed}

    def stream(self, prompts, num_images_per_prompt, first, batch_size, progress, **settings):
        self.asked.append((first, len(prompts) * num_images_per_prompt))
        for i in range(len(prompts) * num_images_per_prompt):
            if first + i == self.stops_at:
                raise KeyboardInterrupt
            image = Image.new("RGB", (SIDE, SIDE), colour(first + i, prompts[i // num_images_per_prompt]))
            image.info = {"picture": first + i}
            progress("painting", i + 1)
            yield image


def export(painter: Painter, benchmark: str, prompts: Path, out: Path, *settings: object, **more: object) -> int:
    return benchmarks.export(painter, benchmark, LAYOUTS[benchmark].read(prompts), out, *settings, **more)


def colour(number: int, prompt: str) -> tuple[int, int, int]:
    return number, len(prompt), 77


RECORDS = [
    {"tag": "single_object", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"},
    {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "a photo of a red ring, ñ"},
    {"tag": "counting", "include": [{"class": "ring", "count": 2}], "prompt": "a photo of two rings"},
]


@pytest.fixture
def geneval(tmp_path) -> Path:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


@pytest.fixture
def dpg(tmp_path) -> Path:
    folder = tmp_path / "dpg_prompts"
    folder.mkdir()
    for name, prompt in {"256": "A metal ladder.", "COCOval0001": "Two dogs\nand a cat.", "7": "Rain"}.items():
        (folder / f"{name}.txt").write_text(prompt)
    return folder


def as_geneval_reads(out: Path) -> dict[str, list[np.ndarray]]:
    """Images by prompt: the numbered PNGs in samples/ of each folder whose name is a number."""
    found = {}
    for folder in filter(str.isdigit, os.listdir(out)):
        with (out / folder / "metadata.jsonl").open() as file:
            record = json.load(file)
        assert record == RECORDS[int(folder)]
        names = sorted(name for name in os.listdir(out / folder / "samples") if re.match(r"\d+\.png", name))
        found[record["prompt"]] = [np.asarray(Image.open(out / folder / "samples" / name)) for name in names]
    return found


def test_geneval(geneval, tmp_path):
    out = tmp_path / "out"
    calls = []
    assert export(Painter(), "geneval", geneval, out, progress=lambda *what: calls.append(what)) == 12
    images = as_geneval_reads(out)
    assert set(images) == {record["prompt"] for record in RECORDS}
    for i, record in enumerate(RECORDS):
        colours = [tuple(image[0, 0].tolist()) for image in images[record["prompt"]]]
        assert colours == [colour(4 * i + j, record["prompt"]) for j in range(4)]
    assert sorted(os.listdir(out / "00002")) == ["metadata.jsonl", "samples"]
    assert sorted(os.listdir(out / "00002" / "samples")) == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert calls[-1] == ("painting", 12, 12)


def test_dpg_bench(dpg, tmp_path):
    out = tmp_path / "out"
    assert export(Painter(), "dpg-bench", dpg, out) == 12
    assert sorted(os.listdir(out)) == ["256.png", "7.png", "COCOval0001.png"]
    sheet = Image.open(out / "COCOval0001.png")
    assert sheet.size == (2 * SIDE, 2 * SIDE)
    crops = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]  # the scorer's, in its order
    for j, (left, top) in enumerate(crops):
        crop = np.asarray(sheet.crop((left, top, left + SIDE, top + SIDE)))
        assert (crop == colour(8 + j, "Two dogs and a cat.")).all()


def test_an_interrupted_export_resumes(geneval, dpg, tmp_path):
    for benchmark, source in (("geneval", geneval), ("dpg-bench", dpg)):
        out = tmp_path / benchmark
        with pytest.raises(KeyboardInterrupt):
            export(Painter(stops_at=6), benchmark, source, out)  # among the second prompt's images
        assert len(list(out.iterdir())) == 1
        painter = Painter()
        export(painter, benchmark, source, out)
        assert painter.asked == [(4, 8)]
        whole = {file.relative_to(out): file.read_bytes() for file in sorted(out.rglob("*.png"))}
        # A gap is filled, and nothing else is made
        second = sorted(out.iterdir())[1]
        for file in [second] if second.is_file() else [*second.rglob("*.*")]:
            file.unlink()
        for folder in () if second.suffix else (second / "samples", second):
            folder.rmdir()
        painter = Painter()
        export(painter, benchmark, source, out)
        assert painter.asked == [(4, 4)]
        assert {file.relative_to(out): file.read_bytes() for file in sorted(out.rglob("*.png"))} == whole
        export(painter, benchmark, source, out)
        assert len(painter.asked) == 1


def test_different_images_are_not_mixed(geneval, dpg, tmp_path):
    out = tmp_path / "out"
    export(Painter(), "geneval", geneval, out)
    with pytest.raises(UserError, match=r"other images, with different seed: choose.*delete it and out\.json"):
        export(Painter(), "geneval", geneval, out, seed=1)
    with pytest.raises(UserError, match="with different images:"):
        export(Painter(), "geneval", geneval, out, images=2)
    geneval.write_text(geneval.read_text().replace("two", "three"))
    with pytest.raises(UserError, match="with different prompts_sha256:"):
        export(Painter(), "geneval", geneval, out)
    with pytest.raises(UserError, match="four square images"):
        export(Painter(), "dpg-bench", dpg, tmp_path / "dpg", images=2)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    with pytest.raises(UserError, match="full contains other images"):
        export(Painter(), "geneval", geneval, full)


@pytest.mark.slow
def test_from_the_command_line(capfd, geneval, dpg, tmp_path, tiny_flux):
    """The images equal those of `arcflow sample`."""
    sampling = ("--model", tiny_flux, "--teacher", "--steps", 1, "--height", 32, "--width", 32, "--seed", 5)
    prompts = ["a red ring", "a green circle"]
    geneval.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    together = (*sampling, "--images", 2, "--batch-size", 3)
    export_geneval = ("evaluate", "export", "--benchmark", "geneval", "--prompts", geneval)
    export_dpg = ("evaluate", "export", "--benchmark", "dpg-bench", "--prompts", dpg)
    code, stdout, stderr = run(capfd, *export_geneval, *together, "--out", tmp_path / "out")
    assert code == 0, stderr
    assert stdout == f"{tmp_path / 'out'} has 4 images\n"
    sample = ("sample", "--prompts-file", tmp_path / "prompts.txt", "--out", tmp_path / "sampled")
    code, stdout, stderr = run(capfd, *sample, *together)
    assert code == 0, stderr
    for i, file in enumerate(stdout.split()):
        with Image.open(file) as sampled, Image.open(tmp_path / f"out/{i // 2:05d}/samples/{i % 2:04d}.png") as made:
            assert made.text == sampled.text
            np.testing.assert_array_equal(np.asarray(made), np.asarray(sampled))

    def refused(message: str, *arguments: object) -> None:
        assert_refused(capfd, tmp_path, *arguments, "--out", tmp_path / "new", message=message)

    refused("name the student with --adapter", *export_dpg, "--model", tiny_flux)
    refused("GenEval's prompts are in its prompts/evaluation_metadata.jsonl", *export_geneval[:-1], "x", *sampling)
    refused("DPG-Bench's prompts are in dpg_bench/prompts", *export_dpg[:-1], geneval, *sampling)
    refused("four square images", *export_dpg, *sampling, "--width", 64)
    (dpg / "a.b.txt").write_text("a ring")
    refused(r"a\.b\.txt: the scorer matches images by their names up to the first dot", *export_dpg, *sampling)
    geneval.write_text('{"prompt": " "}\n')
    refused("line 1: the prompt is empty", *export_geneval, *sampling)
