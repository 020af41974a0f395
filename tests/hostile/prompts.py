"""Damaged prompts: text, JSON lines, Parquet, folders; benchmarks' prompts."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.evaluate.benchmarks import LAYOUTS
from tests.hostile import good, mutate
from tests.hostile.case import Case

TEXTS = [*good.PROMPTS, "last\u2028line", "tab\tand \x1b[31mred", "é" * 50]


def record(rng: random.Random, sized: bool) -> dict[str, Any]:
    return {"prompt": rng.choice(TEXTS), "id": 1} | ({"height": 16, "width": 32} if sized else {})


def expected_lines(data: bytes, sized: bool) -> list[str] | None:
    """The prompts of JSON lines; None if the file has to be refused."""
    texts = []
    lines = [line.removeprefix(b"\xef\xbb\xbf") for line in data.split(b"\n")]
    for line in filter(bytes.strip, lines):
        try:
            values = json.loads(line.decode(), parse_int=lambda digits: int(digits) if len(digits) < 4000 else None)
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict) or not isinstance(values.get("prompt", 0), str | None):
            return None
        text = values["prompt"] or ""
        try:
            text.encode()
        except UnicodeEncodeError:
            return None
        sizes = [values.get("height"), values.get("width")]
        if sized and any(type(side) is not int or not 0 < side <= 2**16 for side in sizes):
            return None
        texts += filter(None, [text.strip()])
    return texts or None


def expected_text(data: bytes) -> list[str] | None:
    try:
        lines = [line.decode("utf-8-sig" if i == 0 else "utf-8").strip() for i, line in enumerate(data.split(b"\n"))]
    except UnicodeDecodeError:
        return None
    return [line for line in lines if line] or None


def texts(rng: random.Random, folder: Path) -> Case:
    """.txt and .jsonl."""
    sized = rng.random() < 0.3
    file = folder / "in" / rng.choice(("prompts.txt", "prompts.jsonl"))
    file.parent.mkdir()
    if file.suffix == ".txt":
        data = "\n".join(rng.choice(TEXTS) for _ in range(5)).encode()
        data, what = mutate.damaged(rng, data)
        if rng.random() < 0.3:
            data, what = rng.choice(TEXTS).encode(rng.choice(("utf-16", "utf-8-sig", "utf-32", "utf-8"))), "encoding"
        expected = expected_text(data)
    else:
        lines = [json.dumps(record(rng, sized), ensure_ascii=rng.random() < 0.5) for _ in range(4)]
        damage = mutate.json_value(rng, record(rng, sized))
        lines[rng.randrange(4)] = damage.text.decode("utf-8", "surrogateescape").replace("\n", " ")
        data, what = "\n".join(lines).encode("utf-8", "surrogateescape"), damage.what
        if rng.random() < 0.2:
            data, what = b"\xef\xbb\xbf" + data, f"BOM, {what}"
        expected = expected_lines(data, sized)
    file.write_bytes(data)

    def wrong(result: Any) -> str | None:
        if expected is None:
            return "accepted, but the file has to be refused"
        return None if result.texts == expected else f"other prompts: {result.texts[:2]} for {expected[:2]}"

    what = f"{file.suffix}: {what}"
    odd = (b"\xef\xbb\xbf", b"NaN", b"Infinity", b"1e999", b"0" * 999, b"ud800")
    right = expected is not None and not any(text in data for text in odd)
    return Case(what, lambda: read_prompts(file), [str(file)], wrong, folder / "in", folder / "work", right)


@functools.cache
def tables() -> dict[str, bytes]:
    """Parquet files, good and odd."""
    columns: dict[str, Any] = {
        "good": {"prompt": TEXTS},
        "sized": {"prompt": TEXTS, "height": [16] * 7, "width": [32] * 7},
        "zero size": {"prompt": TEXTS, "height": [0] * 7, "width": [32] * 7},
        "float size": {"prompt": TEXTS, "height": [1.5] * 7, "width": [32.0] * 7},
        "numbers": {"prompt": list(range(7))},
        "bytes": {"prompt": [b"\xff\xfe"] * 7},
        "nested": {"prompt": [{"a": 1}] * 7},
        "nulls": {"prompt": [None] * 7},
        "other": {"x\x1b[31m\n": TEXTS},
        "none": {"prompt": pa.array([], pa.string())},
    }
    found = {}
    for name, values in columns.items():
        for compression in ("none", "snappy"):
            sink = pa.BufferOutputStream()
            parquet.write_table(pa.table(values), sink, compression=compression)
            found[f"{name} {compression}"] = sink.getvalue().to_pybytes()
    text = pa.array([b"\xff\xfe", b"ok"], pa.binary()).view(pa.string())
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"prompt": text}), sink)
    return found | {"no UTF-8": sink.getvalue().to_pybytes()}


def table(rng: random.Random, folder: Path) -> Case:
    """.parquet."""
    file = folder / "in" / "prompts.parquet"
    file.parent.mkdir()
    whole = rng.random() < 0.2
    name = rng.choice(sorted(tables())) if whole else rng.choice(("good none", "sized snappy"))
    data, what = (tables()[name], "whole") if whole else mutate.damaged(rng, tables()[name])
    file.write_bytes(data)

    def wrong(result: Any) -> str | None:
        if whole and not name.startswith(("good", "sized")):
            return "accepted, but has to be refused"
        bad = [text for text in result.texts if not text.strip() or "\ud800" in text]
        same = result.texts == TEXTS
        # A Parquet file has no checksums of its own: a text may differ, but not the shape of the table
        return "texts are no texts" if bad or not (same or len(result.texts) <= len(TEXTS)) else None

    return Case(f"{name}: {what}", lambda: read_prompts(file), [str(file)], wrong, folder / "in", folder / "work")


def places(rng: random.Random, folder: Path) -> Case:
    """Folders with odd files and names; fields that are not there."""
    place = folder / "in" / "prompts"
    place.mkdir(parents=True)
    (place / "a.txt").write_text("a fox\n")
    odd = place / f"{mutate.name(rng)}{rng.choice(('.txt', '.jsonl', '.parquet', '.TXT'))}"
    kind = rng.choice(("odd", "name", "field", "itself"))
    field = "prompt"
    if kind == "odd":
        what = mutate.odd_file(rng, odd)
    elif kind == "name":
        odd.write_bytes(rng.choice((b"a dog\n", b"\xff\n")) if odd.suffix == ".txt" else b'{"prompt": "a dog"}\n')
        what = f"a file {odd.name!r}"
    elif kind == "field":
        (place / "a.txt").rename(place / "b.jsonl")
        (place / "b.jsonl").write_text('{"prompt": "a fox", "x\x1b[31m": "y"}\n'.replace("\x1b", "\\u001b"))
        field = rng.choice(("x", "", "prompt\n", "\x1b[31m", "\ud800", "é" * 2000, "{0}"))
        what = f"field {field[:20]!r}"
    else:
        what = mutate.odd_file(rng, place)

    def wrong(result: Any) -> str | None:
        return None if set(result.texts) <= {"a fox", "a dog"} and kind != "field" else f"{what}: {result.texts[:3]}"

    return Case(what, lambda: read_prompts(place, field), [str(folder)], wrong, folder / "in", folder / "work")


def benchmark(rng: random.Random, folder: Path) -> Case:
    """GenEval's and DPG-Bench's prompts."""
    place = folder / "in"
    place.mkdir()
    if rng.random() < 0.6:
        source, layout = place / "evaluation_metadata.jsonl", "geneval"
        good_record = {"tag": "x", "include": [{"class": "fox", "count": 1}], "prompt": "a photo of a fox"}
        damage = mutate.json_value(rng, good_record)
        data, what = damage.text.replace(b"\n", b" ") + b"\n" + json.dumps(good_record).encode() + b"\n", damage.what
        source.write_bytes(data)
        expected = expected_lines(data, False)
        if expected is not None and len(expected) < len([line for line in data.split(b"\n") if line.strip()]):
            expected = None  # an empty prompt
    else:
        source, layout = place / "dpg", "dpg-bench"
        source.mkdir()
        (source / "1.txt").write_text("a fox")
        name = mutate.name(rng)
        data, what = mutate.damaged(rng, "ein Fuchs – 狐".encode())
        (source / f"{name}.txt").write_bytes(data)
        what, expected = f"{name!r}: {what}", expected_text(data)
        if expected is not None:
            expected = sorted(["a fox", " ".join(expected)])

    def wrong(result: Any) -> str | None:
        if expected is None:
            return "accepted, but has to be refused"
        found = [item.prompt for item in result]
        return None if sorted(found) == sorted(expected) else f"other prompts: {found} for {expected}"

    where = [str(source)]
    return Case(f"{layout} {what}", lambda: LAYOUTS[layout].read(source), where, wrong, place, folder / "work")
