"""Damaged and odd images, with captions: for training, and for evaluation."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arcflow_jax.data.images import pixels, read_images
from arcflow_jax.evaluate.image_sets import Folder
from tests.hostile import mutate
from tests.hostile.case import Case

SIDE = (8, 12)  # height, width
CAPTION = "a fox"


def colours(seed: int) -> np.ndarray:  # [H, W, 3] uint8
    return np.random.default_rng(seed).integers(0, 256, (*SIDE, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    more = {"lossless": True} if kind == "WEBP" else {}
    image.save(buffer, kind, **more, **options)
    return buffer.getvalue()


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """How EXIF says that an image is to be shown."""
    flipped = array[:, ::-1] if orientation in (2, 4, 5, 7) else array
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]
    return np.rot90(flipped, turns)


def odd(rng: random.Random) -> tuple[bytes, str, np.ndarray | None, str]:
    """An image that is easily read wrong: its bytes, suffix, right pixels (None: refuse it), and what it is."""
    array = colours(rng.randrange(100))
    what = rng.choice(
        ("exif", "16 bit", "alpha", "palette", "grey alpha", "bit", "bomb", "wide", "float", "trns", "gif")
    )
    if what == "exif":
        orientation = rng.randint(1, 8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        kind = rng.choice(("PNG", "WEBP"))
        data = encoded(Image.fromarray(array), kind, exif=exif)
        return data, f".{kind.lower()}", turned(array, orientation), f"orientation {orientation} in {kind}"
    if what == "16 bit":
        grey = np.random.default_rng(rng.randrange(100)).integers(0, 65536, SIDE, np.uint16)
        right = np.round(grey / 257).astype(np.uint8)
        return encoded(Image.fromarray(grey), "PNG"), ".png", np.stack([right] * 3, -1), "16 bit grey"
    if what in ("alpha", "grey alpha"):
        opacity = np.random.default_rng(1).choice(np.array([0, 255], np.uint8), SIDE)
        if what == "grey alpha":
            array = np.stack([array[..., 0]] * 3, -1)
        image = Image.fromarray(array).convert("RGB" if what == "alpha" else "L")
        image.putalpha(Image.fromarray(opacity))
        right = np.where(opacity[..., None] == 0, 255, array)
        return encoded(image, "PNG"), ".png", right.astype(np.uint8), what
    if what == "palette":
        image = Image.fromarray(array).quantize(16)
        return encoded(image, "PNG"), ".png", np.asarray(image.convert("RGB")), what
    if what == "trns":
        image = Image.fromarray(array).quantize(16)
        index = int(np.asarray(image)[0, 0])
        right = np.asarray(image.convert("RGB")).copy()
        right[np.asarray(image) == index] = 255
        return encoded(image, "PNG", transparency=index), ".png", right, "transparent palette"
    if what == "bit":
        bits = array[..., 0] > 127
        return encoded(Image.fromarray(bits), "PNG"), ".png", np.stack([bits * 255] * 3, -1).astype(np.uint8), what
    if what in ("bomb", "wide"):
        width, height = (100_000, 100_000) if what == "bomb" else (2**31 - 1, 1)
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
        data = b"\x89PNG\r\n\x1a\n"
        for name, body in parts:
            data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        return data, ".png", None, f"{width} × {height} pixels"
    if what == "float":
        return encoded(Image.fromarray(array[..., 0].astype(np.float32)), "TIFF"), ".png", None, "TIFF as .png"
    return encoded(Image.fromarray(array), "GIF"), ".png", None, "GIF as .png"


def damaged(rng: random.Random) -> tuple[bytes, str, Any, str]:
    """A damaged image. A PNG has checksums: if it is read, then right. Others may give other pixels."""
    kind = rng.choice(("PNG", "PNG", "JPEG", "WEBP"))
    array = colours(rng.randrange(100))
    data, what = mutate.damaged(rng, encoded(Image.fromarray(array), kind))
    return data, f".{kind.lower()}", array if kind == "PNG" else Ellipsis, f"{kind}: {what}"


def image_file(rng: random.Random, folder: Path) -> Case:
    """One image that is odd or damaged, read for training or for evaluation."""
    data, suffix, right, what = odd(rng) if rng.random() < 0.5 else damaged(rng)
    place = folder / "in"
    place.mkdir()
    file = place / f"a{suffix}"
    file.write_bytes(data)
    (place / "a.txt").write_text(CAPTION)
    trains = rng.random() < 0.6
    height, width = SIDE if right is None or right is Ellipsis else right.shape[:2]

    def run() -> np.ndarray:
        if trains:
            (image,) = read_images(place)
            return np.round((pixels(image.files[0], height, width) + 1) * 127.5).astype(np.uint8)
        (image,) = Folder(place).stream(0)
        return np.asarray(image)

    def wrong(result: np.ndarray) -> str | None:
        if right is None:
            # TIFF and GIF are images: to read them right is as good as to refuse them
            return f"{what}: accepted" if result.size > 10**6 or "×" in what else None
        if right is Ellipsis:
            return None if result.ndim == 3 and result.shape[2] == 3 else "no image"
        return None if np.array_equal(result, right) else f"other pixels: {what.split(':')[0].rstrip(' 12345678')}"

    sound = ":" not in what and right is not None
    what = f"{what}, for {'training' if trains else 'evaluation'}"
    return Case(what, run, [str(file)], wrong, place, folder / "work", sound)


def captions(rng: random.Random, folder: Path) -> Case:
    """metadata.jsonl and caption files; paths that leave the folder; odd names and files."""
    place = folder / "in" / "images"
    place.mkdir(parents=True)
    for file in (place / "a.png", folder / "in" / "outside.png"):
        file.write_bytes(encoded(Image.fromarray(colours(0)), "PNG"))
    kind = rng.choice(("value", "value", "path", "text", "odd", "encoding", "odd image"))
    expected: list[str] | None = [CAPTION]
    meta = place / "metadata.jsonl"
    record: dict[str, Any] = {"file_name": "a.png", "text": CAPTION}
    if kind == "value":
        damage = mutate.json_value(rng, record)
        meta.write_bytes(damage.text.replace(b"\n", b" ") + b"\n")
        what, parsed = damage.what, mutate.reparse(damage.text.replace(b"\n", b" "))
        fits = isinstance(parsed, dict) and parsed.get("file_name") == "a.png" and isinstance(parsed.get("text"), str)
        expected = (
            [parsed["text"].strip()] if fits and parsed["text"].strip() and "\ud800" not in parsed["text"] else None
        )
    elif kind == "path":
        name = rng.choice(
            ("../outside.png", str(folder / "in" / "outside.png"), "../images/../outside.png", "sub/../../outside.png")
        )
        (place / "sub").mkdir()
        meta.write_text(json.dumps(record | {"file_name": name}) + "\n")
        what, expected = f"file_name {name}", None
    elif kind == "text":
        data, what = mutate.damaged(rng, rng.choice((CAPTION, "ein Fuchs – 狐", "a\u2028b", "")).encode())
        (place / "a.txt").write_bytes(data)
        try:
            text = data.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            text = ""
        expected = [text] if text else None
    elif kind == "encoding":
        text = rng.choice(("a\u2028b", "a\x85b", "a\x0bb", "狐"))
        line = json.dumps(record | {"text": text}, ensure_ascii=rng.random() < 0.3) + "\n"
        data = rng.choice((b"", b"\xef\xbb\xbf")) + line.encode() + rng.choice((b"", b"\n", b"  \n", b"\r\n"))
        meta.write_bytes(data)
        what, expected = f"metadata.jsonl {data!r}", [text]
    elif kind == "odd":
        meta.write_text(json.dumps(record) + "\n")
        what = mutate.odd_file(rng, meta)
        (place / "a.txt").write_text(CAPTION)
    else:
        other = place / f"{mutate.name(rng)}.png"
        what = mutate.odd_file(rng, other)
        if not other.name.startswith("."):
            expected = [CAPTION, CAPTION] if False else expected
        (place / "a.txt").write_text(CAPTION)
        other.with_suffix(".txt").write_text(CAPTION)

    def run() -> list[str]:
        images = read_images(place)
        for image in images:
            pixels(image.files[0], *SIDE)
        return [image.caption for image in images]

    def wrong(result: list[str]) -> str | None:
        if expected is None:
            return f"accepted, but has to be refused ({kind})"
        return None if result == expected else f"other captions: {result}"

    return Case(what, run, [str(place)], wrong, folder / "in", folder / "work")
