"""A hostile file system: odd names, links, devices, and things of the user in the way of the output."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arcflow_jax.checkpoints.student_formats import export_adapter, find, import_adapter
from arcflow_jax.data.output import read_latents, save_image
from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.evaluate.frechet import Moments
from arcflow_jax.evaluate.statistics import Statistics
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_cache import converted
from arcflow_jax.models.model_directory import ModelDirectory
from tests.helpers.full_disk import disk_for_files_up_to
from tests.hostile import good, mutate
from tests.hostile.case import Case

IMAGE = Image.new("RGB", (8, 8), "red")
STATISTICS = {"images": {"count": 3}, "metrics": ["fid"]}


def write_statistics(out: Path) -> Any:
    Statistics(STATISTICS, {"fid": Moments(3, np.zeros(4), np.eye(4))}).write(out)
    return Statistics.read(out)


def write_image(out: Path) -> Any:
    save_image(IMAGE, out)
    return Image.open(out).size


# What writes a directory, and what a file; each returns something if the output can be read
DIRECTORIES: dict[str, Callable[[str, Path], Any]] = {
    "convert": lambda kind, out: ModelDirectory.open(convert_model(good.source(kind), out)).check_files("vae"),
    "import": lambda kind, out: json.loads(
        (import_adapter(good.export(kind), good.model(kind), out) / "adapter.json").read_text()
    ),
    "export": lambda kind, out: json.loads((export_adapter(good.run(kind), out) / "config.json").read_text()),
}
FILES: dict[str, Callable[[str, Path], Any]] = {
    "statistics": lambda kind, out: write_statistics(out),
    "image": lambda kind, out: write_image(out),
}
SUFFIXES = {"statistics": ".npz", "image": ".png"}


def outputs(rng: random.Random, folder: Path) -> Case:
    """Something of the user's where the output, or what is written before it, has to go."""
    users, work = folder / "in", folder / "work"
    (users / "folder").mkdir(parents=True)
    (users / "folder" / "thesis.txt").write_text("mine")
    (users / "file.txt").write_text("mine")
    work.mkdir()
    name, write = rng.choice([*DIRECTORIES.items(), *FILES.items()])
    kind = rng.choice(("flux", "qwen"))
    good.export(kind)  # not when the time is measured
    suffix = SUFFIXES.get(name, "")
    out = work / f"out{suffix}"
    beside = work / (f".{out.name}.incomplete" if name in DIRECTORIES else f"{out.name}.tmp")
    how = rng.choice(
        (
            "file",
            "folder",
            "link to folder",
            "link to file",
            "dangling",
            "loop",
            "fifo",
            "beside link",
            "long",
            "parent",
            "name",
            "device",
            "beside file",
            "in a file",
        )
    )
    refuse: bool | None = True
    match how:
        case "file":
            out.write_text("mine")
            refuse = name in DIRECTORIES
        case "folder":
            shutil.copytree(users / "folder", out)
        case "link to folder" | "link to file":
            out.symlink_to(users / ("folder" if how == "link to folder" else "file.txt"))
            refuse = name in DIRECTORIES or None  # a file may take the place of a link, whose target stays
        case "dangling":
            out.symlink_to(users / "new")
            refuse = None
        case "loop":
            out.symlink_to(out.name)
            refuse = None
        case "fifo":
            mutate.os.mkfifo(out)
            refuse = None
        case "beside link":
            beside.symlink_to(users / ("folder" if name in DIRECTORIES else "file.txt"))
            refuse = None
        case "beside file":
            beside.symlink_to(users / "new")
            refuse = None
        case "long":
            out = work / (rng.choice(("x" * 300, "é" * 130, "x" * 250, "y" * 245)) + suffix)
            refuse = None
        case "parent" | "in a file":
            out = users / "file.txt" / f"out{suffix}"
        case "device":
            out = Path(rng.choice(("/dev/null", "/proc", "/sys"))) / f"out{suffix}"
        case "name":
            out = work / (mutate.name(rng) + suffix)
            refuse = None

    def wrong(result: Any) -> str | None:
        if refuse:
            return f"{how}: overwritten"
        if out.is_symlink() and how != "link to file":
            return f"{how}: OUT is still a link"
        left = [path.name for path in work.iterdir() if path.name not in (out.name, beside.name)]
        return f"left beside OUT: {left}" if left else None

    names = [str(out), "too long", out.name[:20].encode("unicode_escape").decode()[:8], str(work)]
    return Case(f"{name}: {how}", lambda: write(kind, out), names, wrong, users, work)


def full_disks(rng: random.Random, folder: Path) -> Case:
    """A disk that is full after a few bytes of a file."""
    work = folder / "work"
    work.mkdir()
    name, write = rng.choice([*DIRECTORIES.items(), *FILES.items()])
    kind = rng.choice(("flux", "qwen"))
    good.export(kind)
    size = rng.choice((0, 1, 30, 300, 1000, 4096, 20_000, 100_000))
    out = work / f"out{SUFFIXES.get(name, '')}"

    def run() -> Any:
        with disk_for_files_up_to(size):
            return write(kind, out)

    def wrong(result: Any) -> str | None:
        left = [path.name for path in work.iterdir() if path != out]
        return f"left beside OUT: {left}" if left else None

    return Case(f"{name}: full after {size} bytes", run, [str(out)], wrong, None, work)


READERS: dict[str, Callable[[Path], Any]] = {
    "model": ModelDirectory.open,
    "student": find,
    "source or model": lambda path: ModelDirectory.open(converted(path)),
    "source": lambda path: convert_model(path, path.with_name("never") / "out"),
    "prompts": read_prompts,
    "latents": read_latents,
    "statistics": Statistics.read,
    "released student": lambda path: import_adapter(path, good.model("flux"), path.with_name("never") / "out"),
}


def inputs(rng: random.Random, folder: Path) -> Case:
    """An input that is not there, or is something else, under an odd name."""
    place = folder / "in"
    place.mkdir()
    good.model("flux")  # not when the time is measured
    name, read = rng.choice(list(READERS.items()))
    suffix = rng.choice(
        {"prompts": (".txt", ".jsonl", ""), "latents": (".npy", ".safetensors"), "statistics": (".npz",)}.get(
            name, ("",)
        )
    )
    file = place / (mutate.name(rng) + suffix)
    if rng.random() < 0.2:
        file = place / (rng.choice(("x" * 300, "é" * 200, "a/../" * 50 + "x", "x/" * 30 + "y", "\ud800")) + suffix)
        what = "missing"
    else:
        what = mutate.odd_file(rng, file)

    def wrong(result: Any) -> str | None:
        return None if name == "student" and isinstance(result, Path) else f"{name} accepted"

    names = [str(place), file.name[:20].encode("unicode_escape").decode()[:6], "file"]
    return Case(f"{name}: {file.name[:40]!r} {what}", lambda: read(file), names, wrong, place, None)


HUB = (
    "owner/name",
    "owner/name/folder",
    "hf:owner/name",
    "hf:",
    "hf:x",
    "a/b/c/d/e",
    "../x",
    "a/..",
    "./a/b",
    "/a/b",
    "~/x",
    "a//b",
)
HUB += (
    "a/b:c",
    "a b/c",
    "a/b\n",
    "\x1b[31m/x",
    "[red]/x",
    "é/ü",
    "a/b@main",
    "hf:hf:a/b",
    "https://huggingface.co/a/b",
    "a" * 5000 + "/b",
)
HUB += (
    "a/" + "b" * 300,
    "a/b\x00",
    "",
    " ",
    "a/-b",
    "\ud800/x",
    "hf:a/b/../../c",
    "a/b/" + "c/" * 500,
    "hf://a/b",
    "\u202ea/b",
)


def hub_ids(rng: random.Random, folder: Path) -> Case:
    """Hub ids, without a network: nothing is there."""
    text = rng.choice(HUB)
    name = rng.choice(("student", "source or model", "prompts", "source"))
    place = folder / "nowhere"
    read = READERS[name] if name != "source" else lambda text: convert_model(text, place / "out")

    def wrong(result: Any) -> str | None:
        return None if not text.strip() else "accepted"

    return Case(f"{name}: {text[:40]!r}", lambda: read(text), [""], wrong, None, None)
