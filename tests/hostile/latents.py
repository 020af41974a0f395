"""Damaged latents that a user starts from: .npy and .safetensors."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from arcflow_jax.data.output import read_latents
from arcflow_jax.families.latents import as_tokens
from tests.hostile import mutate, tensors
from tests.hostile.case import Case

SHAPE = (1, 4, 16)  # packed: one image of 2 × 2 tokens


def good() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


def odd(rng: random.Random) -> tuple[bytes, str]:
    """A whole .npy file that is not what it should be."""
    data = npy(good())
    header = rng.choice(("shape", "dtype", "pickle", "fortran", "version", "text"))
    match header:
        case "shape":
            shape = rng.choice(
                ("(1, 4, 1000000000000)", "(-1, 4, 16)", "(1, 4, 16, 0)", "()", "(1.5,)", "(" * 500, "1")
            )
            return data.replace(b"(1, 4, 16)", shape.encode()), f"shape {shape[:30]}"
        case "dtype":
            kind = rng.choice(("<f8", ">f4", "<i4", "|O", "<c8", "<U4", "|V4", "<M8[s]", "x", "<f2"))
            return data.replace(b"'<f4'", repr(kind).encode()), f"dtype {kind}"
        case "pickle":
            return pickle.dumps(Evil()), "a pickle"
        case "fortran":
            return data.replace(b"False", b"True "), "Fortran order"
        case "version":
            return data[:6] + bytes([rng.randrange(10), rng.randrange(3)]) + data[8:], "version"
    return data.replace(
        b"'descr'", rng.choice((b"__import__('os').system('touch ran')", b"'x'", b"[", b"'descr\x00'"))
    ), "header"


def damaged(rng: random.Random, folder: Path) -> Case:
    """The file's bytes, header, dtype or values."""
    place = folder / "in"
    place.mkdir()
    array = good()
    if rng.random() < 0.2:
        array[0, 0, 0] = rng.choice((np.nan, np.inf, 1e38, -np.inf))
    if rng.random() < 0.6:
        file = place / "noise.npy"
        data, what = odd(rng) if rng.random() < 0.5 else mutate.damaged(rng, npy(array))
    else:
        file = place / "noise.safetensors"
        data, what = tensors.damaged(rng, save({"noise": array}))
        if rng.random() < 0.2:
            data, what = save({"a": array, "b": array}), "two tensors"
    file.write_bytes(data)
    if rng.random() < 0.08:
        what = mutate.odd_file(rng, file)

    def run() -> np.ndarray:
        return np.asarray(as_tokens(read_latents(file), 1, 2, 2, 16))

    def wrong(result: np.ndarray) -> str | None:
        if not np.isfinite(result).all() or result.shape != SHAPE or result.dtype != np.float32:
            return f"latents are {result.shape} {result.dtype}"
        if file.suffix == ".safetensors":
            found = tensors.strict(data)
            if found is None or len(found) != 1:
                return "no valid safetensors file of one tensor"
            return (
                None
                if np.array_equal(next(iter(found.values())).astype(np.float32).reshape(SHAPE), result)
                else "other"
            )
        return None if (folder / "ran").exists() is False else "code ran"

    names = [str(file), "latents"]
    return Case(f"{file.suffix} {what}", run, names, wrong, place, folder / "work")
