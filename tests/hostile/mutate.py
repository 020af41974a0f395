"""Damage: to JSON values, to bytes, to names. Every function takes the case's own random generator."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

MISSING = object()


@dataclasses.dataclass(frozen=True)
class Raw:
    """A value by its text in the JSON file, where Python's json would not write it."""

    text: str


NAN, DIGITS, DEEP = Raw("NaN"), Raw("1" + "0" * 5000), Raw("[" * 100_000 + "]" * 100_000)
NUMBERS: tuple[Any, ...] = (0, -1, 1, 2, 3, 0.5, 2.5, -0.5, 1e308, 1e-308, 10**12, 2**31, 2**32, 2**63, 2**64, -(2**63))
BAD_NUMBERS = (NAN, Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), DIGITS, Raw("-" + DIGITS.text))
TEXTS = (
    *("", "x", "0", "2", "true", "None", "NaN", "a\nb", "\x1b[31mred\x1b[0m", "[bold]rich[/bold]", "\ud800", "\x00"),
    *("é" * 300, "x" * 5000, "../../etc/passwd", "/dev/zero", "\u2028", "\u202eabc", "{}", "$HOME", "~"),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [1], [[]], {"a": 1}, [None], [1, "x"], DEEP)


def value(rng: random.Random) -> Any:
    """A value that a reader may not expect."""
    return rng.choice(rng.choice((NUMBERS, BAD_NUMBERS, TEXTS, OTHERS)))


def place(rng: random.Random, tree: Any) -> tuple:
    """The path of a value inside a JSON value: downward from the top, each step as likely as the others."""
    path: tuple = ()
    while isinstance(tree, dict | list) and tree:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        path, tree = (*path, key), tree[key]
        if rng.random() < 0.25:
            break
    return path


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A damaged JSON text.

    Attributes:
      text: the file.
      what: for people.
      field: the name of what was changed.
      parsed: what a strict reader gets: the object, or None where the file has to be refused.
      ignored: whether only an unknown key was added, with an ordinary value.
    """

    text: bytes
    what: str
    field: str
    parsed: Any
    ignored: bool = False


def reparse(text: bytes) -> Any:
    """What JSON says, by Python's parser, without duplicate keys; None if it is no JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(pairs)

    def integer(digits: str) -> Any:
        return math.inf if len(digits) > 4000 else int(digits)

    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique, parse_int=integer)
    except (ValueError, RecursionError):
        return None


def dump(tree: Any, raw: Raw | None = None) -> str:
    text = json.dumps(tree, indent=1)
    return text if raw is None else text.replace('"@RAW@"', raw.text)


def json_value(rng: random.Random, tree: Any) -> Damaged:
    """A JSON value with one value changed, missing, doubled or added; or its text damaged."""
    kind = rng.choices(("swap", "missing", "unknown", "twice", "text"), (60, 12, 6, 6, 16))[0]
    if kind == "text":
        text, what = damaged(rng, json.dumps(tree, indent=2).encode())
        if rng.random() < 0.2:
            text, what = b"\xef\xbb\xbf" + json.dumps(tree).encode(), "BOM"
        return Damaged(text, what, "JSON", reparse(text))
    path = place(rng, tree)
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    field = next((str(key) for key in reversed(path) if isinstance(key, str)), "")
    where = ".".join(map(str, path))
    if kind == "missing":
        del parent[path[-1]]
        return Damaged(dump(tree).encode(), f"{where} missing", field, tree)
    new = value(rng)
    if kind == "unknown" and isinstance(tree, dict):
        tree["zzz_unknown"] = "@RAW@" if isinstance(new, Raw) else new
        where = field = "zzz_unknown"
    elif kind == "twice" and isinstance(parent, dict):
        text = dump({"@TWICE@": 0, **tree} if parent is tree else tree).replace(
            '"@TWICE@": 0', f"{json.dumps(path[-1])}: 7"
        )
        return Damaged(text.encode(), f"{where} twice, the good one last", field, reparse(text.encode()))
    else:
        parent[path[-1]] = "@RAW@" if isinstance(new, Raw) else new
    text = dump(tree, new if isinstance(new, Raw) else None).encode()
    shown = new.text[:20] if isinstance(new, Raw) else repr(new)[:40]
    ordinary = not isinstance(new, Raw) and new != "\ud800"
    return Damaged(text, f"{where} = {shown}", field, reparse(text), field == "zzz_unknown" and ordinary)


def damaged(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Damaged bytes, and what was done."""
    kind = rng.choice(("flip", "flip", "truncate", "extend", "zero", "swap", "empty", "noise", "double", "cut"))
    n, size = len(data), len(data)
    at = rng.randrange(max(1, n))
    block = rng.choice((1, 8, 64, 512))
    if kind == "flip" and n:
        bit = rng.randrange(8)
        return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :], f"bit {bit} of byte {at} of {size} flipped"
    if kind == "truncate":
        return data[:at], f"truncated to {at} of {size}"
    if kind == "extend":
        return data + rng.randbytes(block), f"{block} bytes appended"
    if kind == "zero":
        end = min(n, at + block)
        return data[:at] + bytes(end - at) + data[end:], f"bytes {at} to {end} of {size} zero"
    if kind == "swap" and n > 2 * block:
        a, b = sorted(rng.sample(range(0, n // block), 2))
        a, b = a * block, b * block
        swapped = data[:a] + data[b : b + block] + data[a + block : b] + data[a : a + block] + data[b + block :]
        return swapped, f"blocks of {block} at {a} and {b} of {size} swapped"
    if kind == "noise":
        return rng.randbytes(min(n, 1000)), "random bytes"
    if kind == "double":
        return data + data, "twice in a row"
    if kind == "cut":
        return data[:at] + data[at + block :], f"{block} bytes at {at} of {size} cut out"
    return b"", "empty"


NAMES = (
    *("a\nb", "\x1b[31mred", "[bold red]x", "a b", "é" * 100, "ü" * 110, "-x", "--help", "a\tb", "a\x7fb", "'", '"'),
    *("%s", "{x}", "a\u2028b", "\u202eabc", ".hidden", "x" * 240, "con", "a\\b", "*", "?", "~", "$HOME", "#", ";", "|"),
)


def name(rng: random.Random) -> str:
    """A name of a file that a terminal or a program may take for something else."""
    return rng.choice(NAMES)


def odd_file(rng: random.Random, path: Path) -> str:
    """Puts something else in the place of a file. Returns what."""
    kind = rng.choice(("fifo", "directory", "loop", "dangling", "device", "zeros", "missing", "empty", "huge"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind in ("device", "zeros"):
        path.symlink_to("/dev/null" if kind == "device" else "/dev/zero")
    elif kind == "empty":
        path.touch()
    elif kind == "huge":  # sparse
        with path.open("wb") as file:
            file.truncate(1 << 40)
    return f"{path.name} is {kind}"
