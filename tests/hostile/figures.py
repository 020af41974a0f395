"""Damaged files of an evaluation: statistics of images, trajectory reports, records of benchmark images."""

from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from arcflow_jax.evaluate.frechet import Moments, frechet_distance
from arcflow_jax.evaluate.statistics import FORMAT, Statistics
from arcflow_jax.evaluate.trajectory.report import PARTIAL, REPORT, evaluate, read_partial
from tests.helpers.fake_comparison import FakeComparison
from tests.hostile import good, mutate
from tests.hostile.case import Case


def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((20, 6))


@functools.cache
def parts() -> dict[str, Any]:
    description = {"metrics": ["fid", "clip"], "inception": "0" * 64, "clip": None}
    description["images"] = {"folder": "x", "count": 20, "files_sha256": "0" * 64}
    found: dict[str, Any] = {"format": FORMAT, "description": json.dumps(description)}
    for metric, moments in {
        "fid": Moments.from_features(features()),
        "clip": Moments.from_features(features()[:, :1]),
    }.items():
        found |= {f"{metric}_{field}": value for field, value in vars(moments).items()}
    return found


def packed(values: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    return buffer.getvalue()


def statistics(rng: random.Random, folder: Path) -> Case:
    """A .npz file of statistics, read and used as a reference."""
    place = folder / "in"
    place.mkdir()
    file = place / "statistics.npz"
    values = dict(parts())
    before = json.loads(values["description"])
    kind = rng.choice(("bytes", "description", "array"))
    legal, same_shape = True, False
    if kind == "description":
        damage = mutate.json_value(rng, before)
        values["description"] = damage.text.decode("utf-8", "replace")
        data, what = packed(values), damage.what
        legal = fits_text(values["description"])
    elif kind == "array":
        name = rng.choice([name for name in values if name.startswith(("fid", "clip"))])
        bad = rng.choice(
            (np.nan, np.inf, np.zeros((6, 6)), np.zeros(3), np.float32(1), "x", np.array(["a"]), -1, 2**62, [], 20.5)
        )
        values[name] = (
            np.asarray(bad) if not (isinstance(bad, float) and "count" not in name) else np.full_like(values[name], bad)
        )
        data, what, legal = (
            packed(values),
            f"{name} = {str(bad)[:20]}",
            np.shape(values[name]) == np.shape(parts()[name]),
        )
        legal = (
            legal and np.issubdtype(np.asarray(values[name]).dtype, np.number) and bool(np.isfinite(values[name]).all())
        )
        legal = legal and ("count" not in name or values[name] == 20)
        same_shape = legal
    else:
        data, what = mutate.damaged(rng, packed(values))
        if rng.random() < 0.05:
            data, what = pickled(), "a pickle in it"
    file.write_bytes(data)
    if rng.random() < 0.05:
        what = mutate.odd_file(rng, file)

    def run() -> Any:
        found = Statistics.read(file)
        found.complete  # noqa: B018
        distance = (
            frechet_distance(found.moments["fid"], Moments.from_features(features() + 1))
            if "fid" in found.moments
            else None
        )
        return found, distance

    def wrong(result: Any) -> str | None:
        found, _ = result
        if same_shape:  # written by hand: a zip's own checksums cannot tell
            return None
        if not legal:
            return f"{kind} {what.split(' = ')[0] if kind == 'array' else what[:30]} accepted"
        same = fits(found.description) and set(found.moments) == {"fid", "clip"}
        for metric, moments in found.moments.items():
            for field, value in vars(moments).items():
                same = same and np.array_equal(value, parts()[f"{metric}_{field}"])
        return None if same else "other statistics"

    return Case(f"statistics {kind}: {what}", run, [str(file), "cannot compare"], wrong, place, None)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **parts() | {"fid_mean": np.array([print], object)})
    return buffer.getvalue()


def fits_text(text: str) -> bool:
    """Whether a description, as the file has it, says what was measured."""
    try:
        description = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(description, dict) and fits(description)


def fits(description: dict[str, Any]) -> bool:
    """Whether a description says what was measured. Where the images lay is free."""
    images = description.get("images")
    texts = (description.get("inception"), description.get("clip"))
    return (
        description.get("metrics") == ["fid", "clip"]
        and isinstance(images, dict)
        and type(images.get("count")) is int
        and images["count"] >= 20  # more than 20 is what an interrupted evaluation leaves
        and all(isinstance(text, str | None) for text in texts)
    )


def alike(found: Any, right: Any) -> bool:
    """Whether two JSON values have the same structure. Numbers may be others, which nothing can tell, but finite."""
    if isinstance(right, dict):
        return isinstance(found, dict) and all(alike(found.get(name), x) for name, x in right.items() if name in NEEDED)
    if isinstance(right, list):
        pairs = isinstance(found, list) and zip(found, right, strict=False)
        return isinstance(found, list) and all(alike(x, y) for x, y in pairs)
    return found is None or (type(found) in (int, float) and -1e300 < found < 1e300)


NEEDED = {
    "student",
    "teacher",
    "mean",
    "median",
    "sigma",
    "velocity",
    "state",
    "curves",
    "total",
    "local",
    "drift",
    "cross",
}


@functools.cache
def reports() -> tuple[bytes, bytes]:
    """A good trajectory report, and the file of one that was interrupted after the second batch."""
    folder = good.root() / "trajectory"
    evaluate(FakeComparison(2), good.PROMPTS, folder)
    report = json.loads((folder / REPORT).read_text())
    lines = [json.dumps({"format": report["format"], "version": report["version"], "identity": report["identity"]})]
    fake = FakeComparison(2)
    from arcflow_jax.evaluate.trajectory.report import Tally

    lines += [json.dumps(Tally.from_batch(*fake(good.PROMPTS[i : i + 2], i), 2).to_json()) for i in (0, 2)]
    return (folder / REPORT).read_bytes(), "".join(f"{line}\n" for line in lines).encode()


def trajectory(rng: random.Random, folder: Path) -> Case:
    """trajectory.json, or trajectory.partial.jsonl."""
    out = folder / "work"
    reports()
    out.mkdir()
    report, partial = reports()
    if rng.random() < 0.5:
        file = out / REPORT
        damage = mutate.json_value(rng, json.loads(report))
        file.write_bytes(damage.text)
        what = damage.what
    else:
        file = out / PARTIAL
        lines = partial.splitlines(keepends=True)
        if rng.random() < 0.6:
            damage = mutate.json_value(rng, json.loads(lines[1]))
            data, what = lines[0] + damage.text.replace(b"\n", b" ") + b"\n" + lines[2], damage.what
        else:
            data, what = mutate.damaged(rng, partial)
        file.write_bytes(data)
    identity = json.loads(report)["identity"]

    def run() -> Any:
        if file.name == PARTIAL:
            tally = read_partial(file, identity)
            return [*tally.student, *tally.teacher], {
                k: {n: x.tolist() for n, x in g.items()} for k, g in tally.sums.items()
            }
        return evaluate(FakeComparison(2), good.PROMPTS, out)

    def wrong(result: Any) -> str | None:
        if file.name == PARTIAL:
            values, sums = result
            whole = json.loads(partial.splitlines()[1]), json.loads(partial.splitlines()[2])
            n = len(values) // 2
            # The file has no checksum: another number is told only if it cannot be one
            if any(type(x) not in (int, float) or not 0 <= x < 1e300 for x in values):
                return "endpoint errors are no errors"
            good_sums = whole[0]["sums"]
            shapes = {k: {n: len(x) for n, x in g.items()} for k, g in sums.items()}
            if n and shapes != {k: {n: len(x) for n, x in g.items()} for k, g in good_sums.items()}:
                return "sums have other shapes"
            flat = np.array([x for g in sums.values() for v in g.values() for x in v], np.float64)
            return None if np.isfinite(flat).all() else "sums are not finite"
        good_report = json.loads(report)
        if result["identity"] != identity:
            return "another identity"
        keys = ("endpoint", "segments")
        return None if all(alike(result.get(key), good_report[key]) for key in keys) else "figures are no figures"

    return Case(f"{file.name}: {what}", run, [str(file), "prompt"], wrong, None, None)
