"""Damaged training runs, and students in the authors' layout."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arcflow_jax.checkpoints.student_formats import export_adapter, import_adapter, open_student
from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.networks.student import split_model
from arcflow_jax.training.report.log import forget_after
from tests.hostile import good, mutate, rules, tensors
from tests.hostile.case import Case


@functools.cache
def abstract(kind: str) -> nnx.State:
    """Shapes of the good student, placed on the first device."""
    _, _, state = split_model(good.directory(kind).student(good.ADAPTER[kind], jnp.float32))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)


def read(kind: str, path: Path, raw: bool = False) -> tuple[AdapterDescription, Any]:
    """Description and weights, as the pipeline reads them."""
    description, load = open_student(path, good.directory(kind))
    like = abstract(kind)
    if description.adapter != good.ADAPTER[kind]:
        _, _, like = split_model(good.directory(kind).student(description.adapter, jnp.float32))
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), like)
    return description, jax.device_get(load(like, raw))


@functools.cache
def best(kind: str, raw: bool = False) -> tuple[AdapterDescription, Any]:
    return read(kind, good.run(kind), raw)


DISTILLATION: dict[str, rules.Check] = {
    **{name: rules.whole(1, 10**6) for name in ("nfe", "states", "substeps")},
    **{name: rules.positive(1e6) for name in ("shift", "final_step_ratio")},
    "window": rules.whole(0, 10**6),
    "decay": rules.whole(0, 10**12),
    "cuts": rules.one_of("sorted", "stratified"),
    **dict.fromkeys(("least_share", "mode_dropout"), lambda x: rules.number(0, 1)(x) and x < 1),
    **{name: rules.number(0, 1e6) for name in ("loss_scale", "state_weight", "data_weight")},
    "teacher_guidance": rules.one_of("embedded", "cfg"),
    "negative_prompt": lambda x: isinstance(x, str) and "\ud800" not in x,
}


def adapter_fault(kind: str, parsed: Any, before: dict[str, Any]) -> str | None:
    """Why adapter.json may not say this."""
    if not isinstance(parsed, dict):
        return "the file is no JSON object"
    for key in ("format", "version", "base"):
        if parsed.get(key) != before[key]:
            return f"{key} is another one"
    adapter, distillation = parsed.get("adapter"), parsed.get("distillation")
    if not isinstance(adapter, dict) or not isinstance(distillation, dict):
        return "a part is missing"
    for key in ("modes", "rank", "targets", "basis"):
        if key not in adapter and key == "basis":
            continue
        if adapter.get(key) != before["adapter"][key] or isinstance(adapter[key], bool):
            return f"{key} is another one"
    checks = {"alpha": rules.positive(1e6), "dropout": lambda x: rules.number(0, 1)(x) and x < 1}
    checks["initial_momenta"] = rules.optional(lambda x: rules.numbers(2, 0, 1e6)(x) and min(x) > 0)
    needed = {"nfe", "shift", "final_step_ratio"}
    free = {name: check if name in needed else rules.optional(check) for name, check in DISTILLATION.items()}
    if not rules.number(-1e6, 1e6)(parsed.get("guidance")) or parsed["guidance"] < 0:
        return f"guidance breaks its rule: {parsed.get('guidance')}"
    return rules.broken(checks, adapter) or rules.broken(free, distillation)


def description(rng: random.Random, folder: Path) -> Case:
    """adapter.json of a run: read for sampling, or for an export."""
    kind = rng.choice(good.KINDS)
    run = good.copy(good.run(kind), folder / "in" / "run")
    (folder / "work").mkdir()
    file = run / "adapter.json"
    before = json.loads(file.read_text())
    damage = mutate.json_value(rng, before)
    sealed = good.put_own(rng, file, damage.text)
    exports = rng.random() < 0.3

    def make() -> Any:
        return export_adapter(run, folder / "work" / "out", dtype=np.float32) if exports else read(kind, run)

    def wrong(result: Any) -> str | None:
        if not sealed and damage.parsed != before:
            return "its sha256 is wrong"
        if (fault := adapter_fault(kind, damage.parsed, before)) is not None and not (exports and "base" in fault):
            return fault
        if exports:
            transformer = damage.parsed.get("transformer") or {}
            checks = rules.rules(kind, "transformer", good.PIPELINES[kind][1]["transformer"])
            return rules.broken(checks, transformer.get("config"))
        return None if good.same_arrays(result[1], best(kind)[1]) else "other weights"

    names = [str(file), str(run), "LoRA target"]
    return Case(f"{kind} adapter.json: {damage.what}", make, names, wrong, folder / "in", folder / "work")


def checkpoint(rng: random.Random, folder: Path) -> Case:
    """A file of a run's checkpoint."""
    kind, raw = rng.choice(good.KINDS), rng.random() < 0.3
    run = good.copy(good.run(kind), folder / "in" / "run")
    file = rng.choice(sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file()))
    if rng.random() < 0.8:
        data, what = mutate.damaged(rng, file.read_bytes())
        good.put(file, data)
    elif rng.random() < 0.7:
        what = mutate.odd_file(rng, rng.choice((file, file.parent, run / "checkpoints")))
    else:
        name = rng.choice(("999999999999", "8.orbax-checkpoint-tmp", "-1", "x", "00000007", "10" * 40))
        (run / "checkpoints" / name).mkdir()
        what = f"a folder {name}"

    def wrong(result: Any) -> str | None:
        return None if good.same_arrays(result[1], best(kind, raw)[1]) else "other weights"

    what = f"{kind} {file.relative_to(run)}: {what}"
    return Case(what, lambda: read(kind, run, raw), [str(run)], wrong, folder / "in", folder / "work")


def log(rng: random.Random, folder: Path) -> Case:
    """log.jsonl of a run that resumes after step 4: lines of later steps go, the others stay."""
    file = folder / "run" / "log.jsonl"
    file.parent.mkdir()
    before = good.run("flux").joinpath("log.jsonl").read_bytes()
    lines = before.splitlines(keepends=True)
    if rng.random() < 0.5:
        damage = mutate.json_value(rng, json.loads(lines[1]))
        lines[1] = damage.text.replace(b"\n", b"") + b"\n"
        data, what = b"".join(lines), damage.what
    else:
        data, what = mutate.damaged(rng, before)
    file.write_bytes(data)

    def run() -> list[bytes]:
        forget_after(file, 4)
        return file.read_bytes().split(b"\n")

    def wrong(result: list[bytes]) -> str | None:
        for line in data.split(b"\n"):
            parsed = mutate.reparse(line)
            keep = isinstance(parsed, dict) and type(parsed.get("step")) is int and 1 <= parsed["step"] <= 4
            if keep and line.strip() not in [each.strip() for each in result] and b"\xef" not in line:
                return "a good line was lost"
        late = [
            x
            for x in map(mutate.reparse, result)
            if isinstance(x, dict) and type(x.get("step")) is int and x["step"] > 4
        ]
        return "a late line was kept" if late else None

    return Case(f"log.jsonl: {what}", run, [str(file)], wrong, None, None)


def export(rng: random.Random, folder: Path) -> Case:
    """A student in the authors' layout: config.json, policy_config, tensors; sampled from, or imported."""
    kind = rng.choice(good.KINDS)
    student = good.copy(good.export(kind), folder / "in" / "student")
    (folder / "work").mkdir()
    config, file = student / "config.json", student / "diffusion_pytorch_model.safetensors"
    part = rng.choice(("config", "policy", "tensors", "tensors", "file"))
    parsed: Any = json.loads(config.read_text())
    policy: Any = {"type": "ArcFlow"}
    data: bytes = file.read_bytes()
    if part == "config":
        damage = mutate.json_value(rng, parsed)
        good.put(config, damage.text)
        parsed, what = damage.parsed, damage.what
    elif part == "policy":
        more = {"nfe": 2, "shift": 3.2, "timestep_ratio": 1.0, "distilled_guidance_scale": 3.5}
        damage = mutate.json_value(rng, policy | more)
        header, payload = tensors.split(data)
        header["__metadata__"] = {"policy_config": damage.text.decode("utf-8", "replace")}
        data = tensors.join(json.dumps(header), payload)
        good.put(file, data)
        policy, what = mutate.reparse(header["__metadata__"]["policy_config"].encode()), damage.what
    elif part == "tensors":
        data, what = tensors.damaged(rng, data)
        good.put(file, data)
    else:
        what = mutate.odd_file(rng, rng.choice((config, file)))
    imports = rng.random() < 0.25

    def run() -> Any:
        if imports:
            return read(kind, import_adapter(student, good.model(kind), folder / "work" / "out"))
        return read(kind, student)

    def wrong(result: Any) -> str | None:
        checks = rules.rules(kind, "transformer", good.PIPELINES[kind][1]["transformer"])
        checks |= {"num_gaussians": rules.one_of(3), "logweights_channels": rules.optional(rules.one_of(4))}
        if part == "file" or (broken := rules.broken(checks, parsed)) is not None:
            return what if part == "file" else broken
        names = {"type": rules.one_of("ArcFlow"), "nfe": rules.whole(1, 10**6), "timestep_ratio": rules.positive(1e6)}
        names |= {"shift": rules.positive(1e6), "distilled_guidance_scale": rules.number(0, 1e6)}
        checks = {name: check if name == "type" else rules.optional(check) for name, check in names.items()}
        if (broken := rules.broken(checks, policy)) is not None:
            return f"policy: {broken}"
        found = tensors.strict(data)
        if found is None:
            return "no valid safetensors file"
        if not all(np.isfinite(x.astype(np.float32)).all() for x in found.values()):
            return "a weight is not finite"
        same = data == good.export(kind).joinpath(file.name).read_bytes()
        return None if not same or good.same_arrays(result[1], best(kind)[1]) else "other weights"

    where = [str(student), "config.json"]
    return Case(f"{kind} {part}: {what}", run, where, wrong, folder / "in", folder / "work")
