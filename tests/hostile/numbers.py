"""Hostile numbers of the pipeline and of the command line: guidance, steps, sizes, seeds, meshes, ratios."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.parallel.mesh import parse_mesh
from arcflow_jax.sampling_settings import resolve_settings
from arcflow_jax.storage.files import read_json
from tests.hostile import good, rules
from tests.hostile.case import Case, command

NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    16,
    32,
    48,
    7,
    0.5,
    1.0,
    3.5,
    -0.5,
    1e308,
    1e-308,
    10**12,
    2**31,
    2**32,
    2**63,
    2**64,
    2**64 - 1,
)
NUMBERS += (math.nan, math.inf, -math.inf, -(2**63), 10**30)
SIDE = lambda x: rules.whole(1, 2**16)(x) and x % 4 == 0  # noqa: E731
CHECKS: dict[str, rules.Check] = {
    "num_inference_steps": rules.whole(1, 10**6),
    "guidance_scale": rules.number(0, 1e6),
    "height": SIDE,
    "width": SIDE,
    "seed": rules.whole(0, 2**64 - 1),
    "final_step_ratio": rules.positive(1e6),
}


def settings(rng: random.Random, folder: Path) -> Case:
    """Arguments of a pipeline's call."""
    kind = rng.choice(("flux", "qwen"))
    directory = good.directory(kind)
    student = AdapterDescription.read(good.run(kind)) if rng.random() < 0.5 else None
    name = rng.choice([name for name in CHECKS if student is not None or name != "final_step_ratio"])
    value = rng.choice(NUMBERS)
    more: dict[str, Any] = {"negative_prompt": ""} if student is None and kind == "qwen" else {}

    def run() -> Any:
        return resolve_settings(directory, student, **{name: value}, **more)

    def wrong(result: Any) -> str | None:
        if not CHECKS[name](value):
            return f"{name} breaks its rule: {value}"
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "height": "rows", "width": "columns"}
        found = getattr(result, names.get(name, name))
        return None if found == (value // 4 if name in ("height", "width") else value) else f"{name} became {found}"

    return Case(f"{kind} {name}={value}", run, [name, "image size"], wrong, None, None)


TEXTS = (
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "-0.0",
    "x",
    "",
    "1" * 400,
    "1" + "0" * 5000,
    "1e308",
    "1000000000000",
)
TEXTS += ("\x1b[31m", "a\nb", "18446744073709551616", "-9223372036854775808", "1_0", "٣", "0x10", " 1", "True", "[red]")
MESHES = (
    "data=0",
    "x=1",
    "data",
    "data=",
    "=1",
    "data=1,data=2",
    "data=-2",
    "data=-1,fsdp=-1",
    "data=999999999999999999",
)
MESHES += (
    "data=2",
    "fsdp=1.5",
    "data=\x1b[31m",
    "[red]",
    "a\nb",
    "data=" + "9" * 5000,
    "data==1",
    "data=1;fsdp=1",
    "tensor=٣",
)


def meshes(rng: random.Random, folder: Path) -> Case:
    """The text of a mesh; this machine has one device."""
    text = rng.choice(MESHES)
    return Case(f"mesh {text[:40]!r}", lambda: parse_mesh(text), ["mesh"], lambda mesh: "accepted", None, None)


def always(*options: str) -> dict[str, tuple[str, ...]]:
    """Options whose every value in `TEXTS` has to be refused, apart from those that are a large legal number."""
    return dict.fromkeys(options, ())


# Command → its options, with the values among TEXTS that are right
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "sample": {
        "--steps": ("1_0", "٣", " 1"),
        "--guidance": ("0", "-0.0", "1_0", "٣", " 1"),
        "--height": (),
        "--width": (),
        "--seed": ("0", "1_0", "٣", " 1"),
        "--images": ("1_0", "٣", " 1"),
        "--batch-size": ("1_0", "٣", " 1"),
    },
    "import": {
        "--steps": ("1_0", "٣", " 1"),
        "--guidance": ("0", "-0.0", "1_0", "٣", " 1"),
        "--shift": ("1_0", "٣", " 1"),
        "--final-step-ratio": ("1_0", "٣", " 1"),
    },
    "trajectory": {
        "--steps": (),
        "--teacher-steps": (),
        "--guidance": (),
        "--seed": (),
        "--height": (),
        "--count": (),
        "--batch-size": (),
    },
    "report": {"--batch": (), "--limit": (), "--height": (), "--topology": ("",), "--mesh": ("",)},
    "train": {"--step": (), "--profile": (), "--processes": (), "--process-id": ()},
}
RIGHT = ("0", "-0.0", "1_0", "٣", " 1", "1000000000000", "1e308")


def commands(rng: random.Random, folder: Path) -> Case:
    """Numbers on the command line. Only an import may take them, which writes them down; the others have to refuse."""
    kind = rng.choice(("flux", "qwen"))
    name = rng.choice(list(OPTIONS))
    option = rng.choice(list(OPTIONS[name]))
    text = rng.choice([text for text in TEXTS if name == "import" or text not in RIGHT])
    work = folder / "work"
    work.mkdir()
    prompts = folder / "prompts.txt"
    prompts.write_text("a fox\na dog\n")
    out = work / "out"
    base: dict[str, list[object]] = {
        "sample": ["sample", "--model", good.model(kind), "--teacher", "--prompt", "x", "--out", out],
        "import": ["convert", "--adapter", good.export(kind), "--base", good.model(kind), "--out", out],
        "trajectory": ["evaluate", "trajectory", "--model", good.model(kind), "--adapter", good.run(kind)],
        "report": [
            "compile-report",
            "--config",
            "tiny",
            "--out",
            work / "r.json",
            f"--config.model={good.model(kind)}",
        ],
        "train": ["train", "--config", "tiny", f"--config.model={good.model(kind)}", f"--config.prompts={prompts}"],
    }
    base["trajectory"] += ["--prompts", prompts, "--out", out]
    base["report"] += [f"--config.model={good.model(kind)}"]
    base["train"] += [f"--config.out={out}"]
    base["report"] += ["--topology", "v5p:1x1x1"] if option != "--topology" else []
    base["report"] += ["--width", "16"] if option == "--height" else []

    def wrong(result: str) -> str | None:
        if name != "import" or text not in OPTIONS[name][option]:
            return f"{option} {text[:20]!r} accepted"
        description = read_json(out / "adapter.json")
        stored = description["distillation"] | {"guidance": description["guidance"]}
        found = stored[{"--steps": "nfe", "--final-step-ratio": "final_step_ratio"}.get(option, option[2:])]
        return None if found == float(text) else f"{option} became {found}"

    names = [
        option,
        option[2:].replace("-", "_"),
        option[2:],
        "mesh",
        "topology",
        "image size",
        "process",
        "checkpoint",
    ]
    names += ["libtpu"] * (name == "report")
    return Case(
        f"{name} {option}={text[:40]!r}", lambda: command(*base[name], f"{option}={text}"), names, wrong, None, work
    )
