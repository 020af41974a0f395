"""Damaged diffusers folders, for `arcflow convert`: of all families; and a damaged single file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from arcflow_jax.models.conversion import convert_model
from arcflow_jax.storage.files import read_json
from tests.hostile import good, mutate, rules, tensors
from tests.hostile.case import Case


def start(rng: random.Random, folder: Path, what: str) -> tuple[str, Path, dict[str, Any]]:
    """A copy of a good source, and how a case converts it."""
    kind = rng.choice(good.KINDS)
    source = good.copy(good.source(kind), folder / "in" / "source")
    (folder / "work").mkdir()
    arguments = {
        "run": lambda: convert_model(source, folder / "work" / "out"),
        "inputs": folder / "in",
        "work": folder / "work",
    }
    return kind, source, arguments


def described(out: Path) -> dict[str, Any]:
    return read_json(out / "model.json")


def unchanged(kind: str, result: Path, but: str = "") -> str | None:
    """Why a conversion differs from the good one: in weights, or in the files of its tokenizers."""
    ours, theirs = described(result)["components"], described(good.model(kind))["components"]
    for name, component in theirs.items():
        if name != but and component["fingerprint"] != ours[name]["fingerprint"]:
            return f"{name} has other weights"
    for file in good.model(kind).glob("tokenizer*/*"):
        copy = result / file.relative_to(good.model(kind))
        if but not in file.parts and (not copy.is_file() or copy.read_bytes() != file.read_bytes()):
            return f"{copy.name} is another file"
    if foreign := [path.name for path in result.rglob("*") if path.is_symlink()]:
        return f"links are in the output: {foreign}"
    return None


def config(rng: random.Random, folder: Path) -> Case:
    """A component's config.json, or the scheduler's."""
    kind, source, arguments = start(rng, folder, "config")
    names = [*good.PIPELINES[kind][1], "scheduler"]
    component = rng.choice(names)
    file = source / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    before = json.loads(file.read_text())
    checks = rules.SCHEDULER if component == "scheduler" else rules.rules(kind, component, before)
    damage = mutate.json_value(rng, before)
    good.put(file, damage.text)

    def wrong(result: Path) -> str | None:
        if (broken := rules.broken(checks, damage.parsed)) is not None:
            return f"{component} of {kind}: {broken}"
        return unchanged(kind, result)

    arguments["harmless"] = damage.ignored
    return Case(f"{component}: {damage.what}", names=[str(file), component], wrong=wrong, **arguments)


def index(rng: random.Random, folder: Path) -> Case:
    """model_index.json, or the index of the shards."""
    kind, source, arguments = start(rng, folder, "index")
    file = source / rng.choice(("model_index.json", "text_encoder/model.safetensors.index.json"))
    before = json.loads(file.read_text())
    if rng.random() < 0.25 and "weight_map" in before:
        name = rng.choice(list(before["weight_map"]))
        shard = rng.choice(("../vae/x.safetensors", "/etc/passwd", "..", ".", "/dev/zero", "\x1b[31m\n", "x" * 300))
        before["weight_map"][name] = shard
        good.put(file, json.dumps(before).encode())
        return Case(f"shard {shard!r}", names=[file.name, str(file.parent)], **arguments)
    damage = mutate.json_value(rng, before)
    good.put(file, damage.text)

    def wrong(result: Path) -> str | None:
        parsed = damage.parsed
        if not isinstance(parsed, dict):
            return "the file is no JSON object"
        if kind == "flux2" and "weight_map" not in before and parsed.get("is_distilled", False) is not False:
            return "is_distilled is another one"
        matter = ("weight_map",) if "weight_map" in before else (*good.PIPELINES[kind][1], "_class_name")
        for key in matter:
            if key == "weight_map" or key == "_class_name":
                if parsed.get(key) != before[key]:
                    return f"{key} is another one"
            elif not isinstance(parsed.get(key), list) or parsed[key][-1:] != before[key][-1:]:
                return f"{key} is another one"
        return unchanged(kind, result)

    names = [str(file), str(file.parent)]
    return Case(f"{file.name}: {damage.what}", names=names, wrong=wrong, **arguments)


def weights(rng: random.Random, folder: Path) -> Case:
    """A weights file: its bytes, its header, or its values."""
    kind, source, arguments = start(rng, folder, "weights")
    file = rng.choice(sorted(source.glob("*/*.safetensors")))
    data, what = tensors.damaged(rng, file.read_bytes())
    before = load(file.read_bytes())
    good.put(file, data)

    def wrong(result: Path) -> str | None:
        found = tensors.strict(data)
        if found is None:
            return f"{file.name} is no valid safetensors file"
        fault, same = fault_of(kind, found, before)
        return fault or unchanged(kind, result, but="" if same else file.parent.name)

    names = [file.name, str(file.parent), f"{file.parent.name}"]
    return Case(f"{kind} {file.parent.name}: {what}", names=names, wrong=wrong, **arguments)


def single_file(rng: random.Random, folder: Path) -> Case:
    """FLUX.2's transformer in the layout of its authors."""
    file = good.copy(good.original().parent, folder / "in" / "original") / good.original().name
    (folder / "work").mkdir()
    before = file.read_bytes()
    data, what = tensors.damaged(rng, before)
    good.put(file, data)

    def run() -> Path:
        return convert_model(good.source("flux2"), folder / "work" / "out", files={"transformer": file})

    def wrong(result: Path) -> str | None:
        found = tensors.strict(data)
        if found is None:
            return f"{file.name} is no valid safetensors file"
        fault, same = fault_of("flux2", found, load(before))
        return fault or unchanged("flux2", result, but="" if same else "transformer")

    return Case(f"single file: {what}", run, [str(file)], wrong, folder / "in", folder / "work")


def fault_of(kind: str, found: dict[str, np.ndarray], before: dict[str, np.ndarray]) -> tuple[str | None, bool]:
    """Why tensors cannot stand for the good ones, and whether they have the same values; of those that are used."""
    if kind == "flux2":
        found, before = (
            {name: x for name, x in each.items() if not good.UNUSED.fullmatch(name)} for each in (found, before)
        )
    same = same_values(found, before)
    if not same and form(found) != form(before):
        return "names, shapes or dtypes are others", same
    if not all(np.isfinite(x.astype(np.float32)).all() for x in found.values()):
        return "a weight is not finite", same
    negative = any((x < 0).any() for name, x in found.items() if name.endswith("running_var"))
    return "a variance is negative" if negative else None, same


def form(found: dict[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (x.shape, str(x.dtype)) for name, x in found.items()}


def same_values(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[x].shape == b[x].shape and (a[x] == b[x]).all() for x in a)


def files(rng: random.Random, folder: Path) -> Case:
    """Another thing in the place of a file or folder; foreign files and links in a tokenizer's folder."""
    kind, source, arguments = start(rng, folder, "files")
    if rng.random() < 0.4:
        tokenizer = rng.choice(sorted(source.glob("tokenizer*")))
        link = tokenizer / rng.choice(("link", "tokenization_x.py", "weights.bin", mutate.name(rng)))
        what = rng.choice(("link to a file", "link to a folder", "loop", "python", "fifo", "huge", "folder"))
        match what:
            case "link to a file" | "link to a folder":
                link.symlink_to("/etc/passwd" if what == "link to a file" else "/etc/security")
            case "loop":
                link.symlink_to(".")
            case "python":
                link.write_text("raise SystemExit(9)")
            case "huge":
                with link.open("wb") as file:
                    file.truncate(1 << 36)
            case "fifo":
                mutate.os.mkfifo(link)
            case "folder":
                link.mkdir()

        def wrong(result: Path) -> str | None:
            names = {path.name for path in tokenizer.iterdir()} - {link.name}
            if copied := {path.name for path in (result / tokenizer.name).iterdir()} - names:
                return f"the foreign file was copied: {what} {copied}"
            return unchanged(kind, result)

        return Case(f"{tokenizer.name} has a {what}", names=[tokenizer.name], wrong=wrong, **arguments)
    path = rng.choice(sorted(source.rglob("*")))
    needed = path.relative_to(source).parts[0].startswith("tokenizer")
    what = mutate.odd_file(rng, path)

    def judge(result: Path) -> str | None:
        if not needed:
            return f"{what}, but it was converted"
        good_files = {file.name for file in good.model(kind).glob("tokenizer*/*")}
        if strange := [
            p.name for p in result.rglob("*") if p.is_symlink() or (p.name not in good_files and "token" in p.parts[-2])
        ]:
            return f"{what}: {strange}"
        return None

    return Case(what, names=[path.name, str(path.parent)], wrong=judge, **arguments)
