"""Damaged safetensors files, and a strict reader of them: the oracle."""

from __future__ import annotations

import json
import random

import ml_dtypes
import numpy as np

from tests.hostile import mutate

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4", "U8": "u1"}
DTYPES |= {"I16": "<i2", "I8": "i1", "BOOL": "?"}


def split(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: str, payload: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + payload


def damaged(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Damages the file's bytes, its header, the header's length, or a tensor's values."""
    header, payload = split(data)
    kind = rng.choice(("bytes", "header", "header", "length", "values", "rename", "offsets"))
    if kind == "header":
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        small = mutate.json_value(rng, {name: header[name]})
        rest = json.dumps({key: value for key, value in header.items() if key != name})
        text = small.text.decode("utf-8", "replace").strip()
        if small.field == "JSON" or not text.endswith("}") or not text.startswith("{"):
            return join(text, payload), f"header is only {small.what}"
        inner = text[1:-1].strip()
        return join(rest[:-1] + (", " + inner if inner else "") + "}", payload), f"header: {small.what}"
    if kind == "length":
        length = rng.choice((0, 1, 7, 2**32, 2**63, 2**64 - 1, len(data), len(data) * 2, rng.randrange(1000)))
        return length.to_bytes(8, "little") + data[8:], f"header length {length}"
    if kind == "values":
        name = rng.choice([name for name in header if name != "__metadata__"])
        begin, _ = header[name]["data_offsets"]
        whole = header[name]["dtype"][0] not in "FB"
        bad = rng.choice((0, 1, 127)) if whole else rng.choice((np.nan, np.inf, -np.inf, 3e38, -1.0))
        at = 8 + int.from_bytes(data[:8], "little") + begin
        size = np.dtype(DTYPES[header[name]["dtype"]]).itemsize
        word = np.array(bad, DTYPES[header[name]["dtype"]]).tobytes()
        return data[:at] + word + data[at + size :], f"{name} has {bad}"
    if kind == "rename":
        name = rng.choice([name for name in header if name != "__metadata__"])
        new = rng.choice(
            ("x", "", name + ".", "a\nb\x1b[31m", "[red]", "x" * 5000, "__metadata__", "\u202e", name.upper())
        )
        return join(
            json.dumps({new if key == name else key: value for key, value in header.items()}), payload
        ), f"{name} is called {new[:30]!r}"
    if kind == "offsets":
        names = [name for name in header if name != "__metadata__"]
        a, b = rng.choice(names), rng.choice(names)
        key = rng.choice(("shape", "data_offsets", "dtype"))
        header[a][key], header[b][key] = header[b][key], header[a][key]
        if rng.random() < 0.5:
            header[a]["shape"] = rng.choice(([2**40], [2**63, 2], [0], [-1], [2**32] * 2, []))
        return join(json.dumps(header), payload), f"{key} of {a} and {b} swapped"
    text, what = mutate.damaged(rng, data)
    return text, what


def strict(data: bytes) -> dict[str, np.ndarray] | None:
    """The tensors of a file, None if the file breaks the format's rules."""
    try:
        length = int.from_bytes(data[:8], "little")
        if length > len(data) - 8:
            return None
        header = json.loads(data[8 : 8 + length].decode())
        payload = data[8 + length :]
        found, used = {}, []
        for name, entry in header.items():
            if name == "__metadata__":
                if not all(isinstance(x, str) for x in entry.values()):
                    return None
                continue
            if entry.keys() != {"dtype", "shape", "data_offsets"}:
                pass  # more keys are allowed
            begin, end = entry["data_offsets"]
            dtype = np.dtype(DTYPES[entry["dtype"]])
            if not all(type(x) is int and x >= 0 for x in (*entry["shape"], begin, end)):
                return None
            array = np.frombuffer(payload[begin:end], dtype).reshape(entry["shape"])
            if array.nbytes != end - begin:
                return None
            found[name] = array
            used.append((begin, end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    place = 0
    for begin, end in sorted(used):
        if begin != place:
            return None
        place = end
    return found if place == len(payload) else None
