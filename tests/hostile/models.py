"""Damaged model directories: model.json, checkpoint files, tokenizers."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from arcflow_jax.data.tokenizers import load_tokenizer, token_length, tokenize
from arcflow_jax.generate import teacher_grid
from arcflow_jax.models.model_directory import ModelDirectory
from tests.hostile import good, mutate, rules
from tests.hostile.case import Case


@functools.cache
def abstract(kind: str, component: str) -> nnx.State:
    return nnx.state(good.directory(kind).abstract(component))


@functools.cache
def weights(kind: str, component: str) -> Any:
    return jax.device_get(good.directory(kind).load(component, abstract(kind, component)))


@functools.cache
def ids(kind: str, tokenizer: str) -> bytes:
    return tokens(good.model(kind) / tokenizer)


def tokens(folder: Path) -> bytes:
    """The ids of some prompts, as the pipeline makes them."""
    tokenizer = load_tokenizer(folder)
    found, cut = tokenize(tokenizer, good.PROMPTS, token_length(tokenizer))
    return found.tobytes() + cut.tobytes()


def start(rng: random.Random, folder: Path) -> tuple[str, Path]:
    kind = rng.choice(good.KINDS)
    return kind, good.copy(good.model(kind), folder / "in" / "model")


def description(rng: random.Random, folder: Path) -> Case:
    """model.json."""
    kind, model = start(rng, folder)
    file = model / "model.json"
    before = json.loads(file.read_text())
    damage = mutate.json_value(rng, before)
    sealed = good.put_own(rng, file, damage.text)

    def run() -> dict[str, Any]:
        directory = ModelDirectory.open(model)
        for component in directory.networks:
            same = directory.config(component) == good.directory(kind).config(component)
            # Building an abstract network takes longest: the good one's, if the config is the good one
            like = abstract(kind, component) if same else nnx.state(directory.abstract(component))
            directory.load(component, like) if rng.random() < 0.25 else directory.check_files(component)
            directory.dtype(component)
        for name in directory.family.tokenizers:
            directory.check_files(name)
        teacher_grid(directory, 16)
        return directory.description

    def wrong(result: dict[str, Any]) -> str | None:
        parsed = damage.parsed
        if not isinstance(parsed, dict):
            return "the file is no JSON object"
        if not sealed and parsed != before:
            return "its sha256 is wrong"
        for name, config in good.PIPELINES[kind][1].items():
            component = parsed["components"][name]
            if (broken := rules.broken(rules.rules(kind, name, config), component["config"])) is not None:
                return f"{name}: {broken}"
            for key in ("class", "dtype"):  # who can seal the file can also name another source, but for the base's
                if component.get(key) != before["components"][name][key]:
                    return f"{key} of a component is another one"
        if (broken := rules.broken(rules.SCHEDULER, parsed["scheduler"])) is not None:
            return f"scheduler: {broken}"
        for key in ("format", "version", "pipeline", "fingerprint", "files"):
            if parsed.get(key) != before[key]:
                return f"{key} is another one"
        return None

    what = f"{kind} model.json: {damage.what}"
    return Case(what, run, [str(file), str(model)], wrong, folder / "in", folder / "work")


def checkpoint(rng: random.Random, folder: Path) -> Case:
    """A file of a component's checkpoint: damaged, missing, another kind, or that of another array."""
    kind, model = start(rng, folder)
    component = rng.choice(list(good.PIPELINES[kind][1]))
    files = sorted(path for path in (model / component).rglob("*") if path.is_file())
    file = rng.choice(files)
    how = rng.random()
    if how < 0.7:
        data, what = mutate.damaged(rng, file.read_bytes())
        good.put(file, data)
        what = f"{file.relative_to(model)}: {what}"
    elif how < 0.85:
        what = mutate.odd_file(rng, rng.choice([file, *file.relative_to(model).parents][:-1] and [file, file.parent]))
    else:
        other = rng.choice(files)
        data = (file.read_bytes(), other.read_bytes())
        good.put(file, data[1])
        good.put(other, data[0])
        what = f"{file.name} and {other.name} of {component} swapped"

    def run() -> Any:
        return ModelDirectory.open(model).load(component, abstract(kind, component))

    def wrong(result: Any) -> str | None:
        return None if good.same_arrays(result, weights(kind, component)) else "an array has other values"

    return Case(f"{kind} {what}", run, [str(model), component], wrong, folder / "in", folder / "work")


def tokenizer(rng: random.Random, folder: Path) -> Case:
    """A tokenizer's files. Its ids have to be the good ones."""
    kind, model = start(rng, folder)
    name = rng.choice(sorted(path.name for path in model.glob("tokenizer*")))
    file = rng.choice(sorted((model / name).iterdir()))
    how = rng.random()
    if how < 0.2:
        what = mutate.odd_file(rng, file)
    elif file.suffix == ".json" and how < 0.7:
        damage = mutate.json_value(rng, json.loads(file.read_text()))
        good.put(file, damage.text)
        what = f"{file.name}: {damage.what}"
    elif how < 0.8:
        code = model / name / "evil.py"
        code.write_text(f"import os\nopen({str(folder / 'in' / 'ran')!r}, 'w').close()\nclass T: pass\n")
        config = json.loads((model / name / "tokenizer_config.json").read_text())
        config["auto_map"] = {"AutoTokenizer": ["evil.T", "evil.T"]}
        config["tokenizer_class"] = rng.choice(("EvilTokenizer", "T", None, "AutoTokenizer", "PreTrainedTokenizer"))
        good.put(model / name / "tokenizer_config.json", json.dumps(config).encode())
        what = f"auto_map, class {config['tokenizer_class']}"
    else:
        data, what = mutate.damaged(rng, file.read_bytes())
        good.put(file, data)
        what = f"{file.name}: {what}"

    def run() -> bytes:
        directory = ModelDirectory.open(model)
        # Which compares checksums, where there are some
        return tokens(directory.tokenizer(name))

    def wrong(result: bytes) -> str | None:
        return None if result == ids(kind, name) else "the tokenizer gives other ids"

    return Case(f"{kind} {name}: {what}", run, [str(model), name], wrong, folder / "in", folder / "work")
