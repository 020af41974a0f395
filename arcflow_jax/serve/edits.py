"""What a client may ask to be edited: OpenAI's form with an image, checked."""

# H, W size in pixels

from __future__ import annotations

import dataclasses
import io
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
import numpy as np
from PIL import Image, ImageOps
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from arcflow_jax.data.images import BROKEN, FORMATS, in_rgb, upright
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.image_to_image import STRENGTH
from arcflow_jax.schema import Strength
from arcflow_jax.serve.requests import Generation, Limits, Order, bad_request, order, parsed
from arcflow_jax.serve.settings import Settings, Start

FILES = ("image", "mask")
IMAGES = 16  # as many as OpenAI's API takes
NUMBERS = ("n", "seed", "steps", "guidance", "strength", "stream")  # a form has texts only
FIELDS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit(Generation):
    """The body of /v1/images/edits: OpenAI's fields, and ours; files as they were sent."""

    image: tuple[bytes, ...]
    mask: bytes | None = None
    strength: Strength | None = None


async def read_form(headers: Headers, chunks: AsyncGenerator[bytes]) -> dict[str, Any]:
    """The fields of a form, of which files are bytes. Raises ApiError 400, and what `chunks` raises.

    Clients write a list as image[], and an object as loras[name]. There may be several images.
    """
    values: dict[str, Any] = {}
    try:
        charset = parse_options_header(headers.get("content-type"))[1].get(b"charset", b"utf-8")
        if charset.lower() not in (b"utf-8", b"utf8"):  # Python knows some that take minutes to decode
            raise UserError("the form has to be in UTF-8")
        parser = MultiPartParser(headers, chunks, max_files=IMAGES + 1, max_fields=FIELDS)
        form = await parser.parse()
        try:
            for key, value in form.multi_items():
                name, bracket, inner = key.partition("[")
                of_lora = name == "loras" and bool(bracket)
                kept = values.setdefault("loras", {}) if of_lora else values
                name = inner.removesuffix("]") if of_lora else name if inner == "]" else key
                if name == "image" and not of_lora and isinstance(value, UploadFile):
                    kept.setdefault(name, []).append(await value.read())
                elif not isinstance(kept, dict) or name in kept:  # loras may have come as a text
                    raise UserError(f"{one_line(key)} is there twice, but may be there once")
                elif isinstance(value, UploadFile):
                    kept[name] = await value.read()
                elif name in FILES and not of_lora:
                    raise UserError(f"{name} is a text, but has to be a file")
                else:
                    kept[name] = number(value) if of_lora or name in NUMBERS else value
        finally:
            await form.close()
    except MultiPartException as error:
        raise bad_request(UserError(f"the form cannot be read: {one_line(error.message)}")) from None
    except UserError as error:
        raise bad_request(error, Edit) from None
    return values


def number(text: str) -> Any:
    """The number, or true or false, that a text stands for; another text as it is."""
    try:
        return msgspec.json.decode(text, type=int | float | bool)
    except (msgspec.MsgspecError, UnicodeError):
        return text


def read_edit(
    values: dict[str, Any],
    default: Settings,
    limits: Limits,
    model: str,
    check: Callable[[Settings], None],
    references: int = 0,
) -> Order:
    """What the fields of a form ask for. Arguments and errors as for `requests.read_order`, and:

    Args:
      references: how many reference images the model reads at most. They are what a form's images are, unless it has a
        mask or a strength; scaled to cover the size of the image made, and cropped, as in distillation.
    """
    try:
        asked = parsed(Edit, values, model)
        most = references if asked.mask is None and asked.strength is None else 0
        if len(asked.image) > max(1, most):
            found, times = (
                {1: "once", 2: "twice"}.get(count, f"{count} times") for count in (len(asked.image), max(1, most))
            )
            raise UserError(f"image is there {found}, but may be there {times}")
        if most:
            wanted = order(asked, default, limits, check, references=len(asked.image))
            side = wanted.settings.width, wanted.settings.height

            def fitted(image: Image.Image) -> Image.Image:
                return ImageOps.fit(in_rgb(image), side, Image.Resampling.LANCZOS)

            images = [opened("image", data, limits.pixels, fitted) for data in asked.image]
            return dataclasses.replace(wanted, start=Start(np.stack(images), None))
        pixels, repaint = opened("image", asked.image[0], limits.pixels, in_rgb), None
        size = shown(pixels)
        if asked.size not in (None, "auto", size):
            raise UserError(f"size is {one_line(asked.size)}, but image has {size}: resize it, or leave size out")
        if asked.mask is not None:
            repaint = opened("mask", asked.mask, limits.pixels, alpha) == 0
            if repaint.shape != pixels.shape[:2]:
                raise UserError(f"mask is {shown(repaint)}, but has to have the size of image, {size}")
            if not repaint.any():
                raise UserError("mask is nowhere fully transparent (alpha 0), which is what is made anew")
        asked, start = dataclasses.replace(asked, size=size), Start(pixels, repaint)
        return order(asked, default, limits, check, start, asked.strength or STRENGTH)
    except UserError as error:
        raise bad_request(error, Edit) from None


def opened(name: str, data: bytes, most: int, part: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Part of an image, [H, W] or [H, W, 3], uint8. Raises UserError, for more pixels than `most` before decoding."""
    try:
        return np.asarray(part(upright(io.BytesIO(data), most)))
    except BROKEN:
        formats = ", ".join(FORMATS)
        raise UserError(f"{name} cannot be read: it has to be one of {formats}, with at most {most} pixels") from None


def alpha(image: Image.Image) -> Image.Image:
    """Its alpha channel; an image without one is opaque."""
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else Image.new("L", image.size, 255)


def shown(array: np.ndarray) -> str:
    """Width and height of an array [H, W, ...]."""
    return f"{array.shape[1]}x{array.shape[0]}"
