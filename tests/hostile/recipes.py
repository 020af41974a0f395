"""Hostile recipes and overrides: `--config.KEY=VALUE`, files, the config.json of a run that resumes."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path
from typing import Any

from arcflow_jax.training.recipe import Recipe, defaults, read_config
from tests.hostile import mutate, rules
from tests.hostile.case import Case
from tests.hostile.students import DISTILLATION

RATE = rules.number(0, 1e3)


def text(x: Any) -> bool:
    return isinstance(x, str)


def sizes(x: Any) -> bool:
    side = rules.whole(1, 2**16)
    return (
        isinstance(x, tuple | list)
        and len(x) > 0
        and all(isinstance(size, tuple | list) and len(size) == 2 and all(map(side, size)) for size in x)
    )


def texts(x: Any) -> bool:
    return isinstance(x, tuple | list) and all(map(text, x))


def pair(x: Any) -> bool:
    return isinstance(x, tuple | list) and len(x) == 2 and all(rules.positive(1e6)(n) for n in x)


def groups(x: Any) -> bool:
    return isinstance(x, tuple | list) and all(
        isinstance(group, tuple | list) and len(group) == 2 and text(group[0]) and RATE(group[1]) for group in x
    )


def mesh(x: Any) -> bool:
    axis = rules.whole(1, 2**20)
    return x == "auto" or (
        isinstance(x, tuple | list)
        and len(x) == 4
        and all((n == -1 and type(n) is int) or axis(n) for n in x)
        and list(x).count(-1) < 2
    )


CHECKS: dict[str, rules.Check] = {
    **{
        name: text
        for name in ("model", "out", "prompts", "prompts_field", "embeddings", "images", "references", "start_from")
    },
    "wandb_project": text,
    "guidance": rules.number(0, 1e6),
    "seed": rules.whole(0, 2**64 - 1),
    "resolutions": sizes,
    "batch": rules.whole(1, 10**9),
    "accumulate": rules.whole(1, 10**9),
    "offload_optimizer": rules.one_of(False, True),
    "dtype": rules.one_of("bfloat16", "float32", "float16"),
    "mesh": mesh,
    "remat": rules.one_of("auto", "full", "attention", "none"),
    **{name: rules.whole(1, 10**12) for name in ("log_every", "save_every", "keep_last")},
    **{name: rules.whole(0, 10**12) for name in ("steps", "keep_every", "max_skipped", "preview_every")},
    "preview_prompts": texts,
    "adapter.modes": rules.whole(1, 10**6),
    "adapter.rank": rules.whole(1, 10**6),
    "adapter.alpha": lambda x: x is None or rules.positive(1e6)(x),
    "adapter.dropout": lambda x: RATE(x) and x < 1,
    "adapter.targets": lambda x: x is None or texts(x),
    "adapter.basis": rules.one_of("momentum", "legendre"),
    "adapter.initial_momenta": pair,
    **{f"distillation.{name}": check for name, check in DISTILLATION.items()},
    "distillation.negative_prompt": text,
    **{f"optimizer.{name}": RATE for name in ("learning_rate", "weight_decay")},
    **{f"optimizer.{name}": rules.whole(0, 10**12) for name in ("warmup", "decay_steps", "clip_from")},
    **{f"optimizer.{name}": lambda x: RATE(x) and x < 1 for name in ("b1", "b2")},
    "optimizer.clip_norm": rules.positive(1e308),
    "optimizer.groups": groups,
    "ema.start": rules.whole(0, 10**12),
    "ema.power": rules.number(0, 1e6),
}
VALUES = (
    *("nan", "inf", "-inf", "float('nan')", "1e999", "-1", "0", "1", "2", "0.5", "1e308", "1e400", "10**12", "2**64"),
    *(
        "1000000000000",
        "18446744073709551616",
        "18446744073709551615",
        "1" + "0" * 5000,
        "-" + "1" * 5000,
        "True",
        "None",
    ),
    *(
        "''",
        "'x'",
        "x",
        "",
        "()",
        "(1,)",
        "(0, 0)",
        "((8, 8),)",
        "((-1, 8),)",
        "((True, 8),)",
        "((2**40, 8),)",
        "[[8, 8]]",
    ),
    *(
        "[]",
        "{}",
        "{1: 2}",
        "{1}",
        "b'x'",
        "1j",
        "...",
        "(" * 500,
        "[" * 100_000,
        "__import__('os')",
        "1_000",
        "0x10",
        "٣",
    ),
    *("\x1b[31m", "a\nb", "[red]x", "\ud800", "\u202e", "x" * 5000, "(1, -1, 1, 1)", "(-1, -1, 1, 1)", "(0, 1, 1, 1)"),
    *(
        "(1, 1, 1, 1, 1)",
        "(1.0, 1, 1, 1)",
        "(10**9, 1, 1, 1)",
        "(('*', nan),)",
        "(('*', -1),)",
        "(('*', 1e999),)",
        "(0.0, 4.0)",
    ),
    *(
        "(1e-300, 1e300)",
        "(4.0, float('inf'))",
        "'bfloat16'",
        "float64",
        "int8",
        "momentum",
        "cfg",
        "none",
        "1.0",
        "3.5",
    ),
)


def overridden(rng: random.Random, folder: Path) -> Case:
    """One override of a bundled recipe."""
    recipe = rng.choice(("flux", "qwen", "tiny", "tiny_qwen", "flux:published", "qwen:compact"))
    key = rng.choice(list(CHECKS))
    if rng.random() < 0.08:
        key = rng.choice(
            ("x", "adapter", "adapter.x", "", ".", "a" * 3000, "adapter.rank.x", "\x1b[31m", "__class__", "ema..")
        )
    value = rng.choice(VALUES)
    option = f"--config.{key}={value}"
    if rng.random() < 0.04:
        option = rng.choice(
            ("--config", "--config.", f"--config.{key}", "--conf.x=1", "x", "--config.=1", f"-{value[:50]}")
        )
        key, value = "config", option
    if rng.random() < 0.05:
        recipe = rng.choice(
            ("x", "flux:x", "flux:", ":", "", "../x.py", "/dev/zero", "os", "flux.py", "\x1b[31m", "a\nb", "é" * 3000)
        )
    given = read_literal(key, value)

    def run() -> Recipe:
        return Recipe.from_config(read_config(recipe, [option]))

    def wrong(result: Recipe) -> str | None:
        if key not in CHECKS:
            return "accepted, but there is no such key"
        if not CHECKS[key](given):
            return f"{key} breaks its rule: {value[:30]!r}"
        stored: Any = result
        for name in key.split("."):
            stored = getattr(stored, name)
        plain = json.loads(json.dumps(stored))
        filled = key == "adapter.alpha" and given is None
        return None if filled or plain == json.loads(json.dumps(given)) else f"{key} became {plain!r}"

    names = [
        key.split(".")[-1][:20] or "key",
        recipe[:20] or "recipe",
        option[:20],
        "mesh",
        "resolutions",
        "recipe",
        "overrides have the form",
    ]
    return Case(f"{recipe[:30]!r} {option[:60]!r}", run, names, wrong, None, None)


WORDS = ("dtype", "remat", "adapter.basis", "distillation.cuts", "distillation.teacher_guidance")


def read_literal(key: str, value: str) -> Any:
    """What an override says: a text as it stands, others in Python's notation."""
    if CHECKS.get(key) is text or key in WORDS:
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value


FILES = (
    "def get_config(): return {}",
    "def get_config(): return None",
    "def get_config(): return 7",
    "def get_config(): raise KeyError('a\\nb')",
    "def get_config(): raise Exception('x' * 5000)",
    "def get_config(): return {'model': 'm', 'out': 'o', 'guidance': float('nan'), 'prompts': 'p'}",
    "def get_config(): return {'model': 'm', 'out': 'o', 'guidance': 1.0, 'prompts': 'p', 'x': 1}",
    "def get_config(): return {'model': 'm', 'out': 'o', 'guidance': 1.0, 'prompts': 'p', 'ema': 3}",
    "def get_config(): return {'model': 'm', 'out': 'o', 'guidance': 1.0, 'prompts': 'p', 'ema': None}",
    "def get_config(): return {'model': 'm', 'out': 'o', 'guidance': 1.0, 'prompts': 'p', 'batch': object()}",
    "def get_config(): return {'model': 'm', 'out': 'o', 'guidance': 1.0, 'prompts': 'p', 'steps': 10**5000}",
    "def get_config(): return {'model': 'm', 3: 'o'}",
    "def get_config(): return {'model': b'm', 'out': 'o', 'guidance': 1.0, 'prompts': 'p'}",
    "get_config = 3",
    "x = 1",
    "def get_config(:",
    "import nothing_of_this_name",
    "def get_config(a, b): return {}",
    "\\x00",
)


def files(rng: random.Random, folder: Path) -> Case:
    """A recipe's file. It is code, which is trusted; that it is broken has to be said in one line."""
    place = folder / "in"
    place.mkdir()
    file = place / rng.choice(("recipe.py", "re cipe.py", "[red].py", "é" * 40 + ".py"))
    code = rng.choice(FILES)
    file.write_text(code)
    what = code[:80]
    if rng.random() < 0.2:
        data, what = mutate.damaged(rng, code.encode())
        file.write_bytes(data)
    elif rng.random() < 0.2:
        what = mutate.odd_file(rng, file)
    names = [str(file), "guidance", "ema", "batch", "steps", "recipe", "--config."]
    return Case(
        what, lambda: Recipe.from_config(read_config(str(file), [])), names, lambda result: "accepted", None, None
    )


def stored(rng: random.Random, folder: Path) -> Case:
    """config.json of a run that resumes: of other settings it has to be refused."""
    place = folder / "in"
    place.mkdir()
    recipe = Recipe(model="m", out="o", guidance=3.5, prompts="p.txt", seed=3)
    before = recipe.resolved()
    damage = mutate.json_value(rng, before)
    (place / "config.json").write_bytes(damage.text)
    free = (
        "model",
        "prompts",
        "prompts_field",
        "embeddings",
        "out",
        "mesh",
        "accumulate",
        "offload_optimizer",
        "remat",
        "steps",
        "log_every",
        "save_every",
        "keep_last",
    )
    free += ("keep_every", "max_skipped", "preview_every", "preview_prompts", "wandb_project")

    def wrong(result: None) -> str | None:
        if not isinstance(damage.parsed, dict):
            return "the file is no JSON object"
        for key, value in before.items():
            if key in free:
                continue
            now = damage.parsed.get(key, value)  # an early version knew fewer keys
            if isinstance(value, dict):
                now = value | now if isinstance(now, dict) else now
            if now != value:
                return f"{key} was other"
        return None

    def run() -> None:
        recipe.check_same(place)

    return Case(damage.what, run, [str(place)], wrong, place, None)


assert set(CHECKS) >= {
    f"{a}.{b}" if isinstance(x, dict) else a for a, x in defaults().items() for b in (x if isinstance(x, dict) else [0])
}
