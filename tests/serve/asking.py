"""Requests to a server or to its application, and what is read of the answers."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

PROMPT = "a red circle on the left"
GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
JSON = {"Content-Type": "application/json"}


def opened(b64: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


def difference(image, other) -> int:
    """The largest one, in levels of 255."""
    return np.abs(np.asarray(image, np.int32) - np.asarray(other, np.int32)).max()


def asked(door, *requests: httpx.Request) -> list[httpx.Response]:
    """Answers of an application, without a socket."""

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://test") as client:
            return await asyncio.gather(*[client.send(request) for request in requests])

    return asyncio.run(ask())


def post(body: object, **headers: str) -> httpx.Request:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.Request("POST", f"http://test{GENERATIONS}", content=content, headers=JSON | headers)


def figures(address: str) -> dict[str, float]:
    """The samples without labels that /metrics shows."""
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def ask(client, prompt: str, seed: int) -> Image.Image:
    return opened(client.images.generate(prompt=prompt, extra_body={"seed": seed}).data[0].b64_json)


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()
