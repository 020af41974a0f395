"""The routes: OpenAI's images and models, and what looks after a server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hmac
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import prometheus_client
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arcflow_jax.errors import UserError, one_line
from arcflow_jax.serve.edits import read_edit, read_form
from arcflow_jax.serve.engine import Busy, Closed, Engine
from arcflow_jax.serve.images import Images
from arcflow_jax.serve.metrics import Metrics
from arcflow_jax.serve.requests import ApiError, Limits, Order, read_order
from arcflow_jax.serve.settings import most_references

LOG = logging.getLogger("arcflow.serve")
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
LINKS = "/v1/images/files/"
OPEN = ("/health", LINKS)  # paths that need no key
GONE = 499  # nginx's status for a client that went away; nobody reads it but the log


class Door:
    """Around all routes: the request's id, the key, the log and the count of answers. Refuses WebSockets.

    A client shows the key as `Authorization: Bearer KEY`, a browser as the password of basic authentication.

    Attributes:
      active: requests for images that have no answer yet.
    """

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics):
        self.app, self.key, self.metrics, self.active = app, key, metrics, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        name, start, status = f"req_{secrets.token_hex(12)}", time.monotonic(), GONE

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        scope.setdefault("state", {})["id"] = name
        path = scope["path"]
        self.active += path in (GENERATIONS, EDITS)
        try:
            if self.key is None or path.startswith(OPEN) or shows(scope, self.key):
                await self.app(scope, receive, answer)
            else:
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                browser = {} if path.startswith("/v1/") else {"WWW-Authenticate": 'Basic realm="arcflow"'}
                await as_response(error, browser)(scope, receive, answer)
        finally:
            self.active -= path in (GENERATIONS, EDITS)
            known = path if path in (GENERATIONS, EDITS, "/v1/models", "/health", "/metrics") else "other"
            shown = LINKS if path.startswith(LINKS) else one_line(path)  # a link is for its client only
            self.metrics.requests.labels(known, status).inc()
            if known in (GENERATIONS, EDITS):
                self.metrics.request_seconds.observe(time.monotonic() - start)
            level = logging.INFO if path.startswith("/v1/") else logging.DEBUG
            LOG.log(level, "%s %s %s %d %.3f s", name, scope["method"], shown, status, time.monotonic() - start)


def shows(scope: Scope, key: str) -> bool:
    """Whether a request shows the key."""
    kind, _, shown = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"basic":
        try:
            _, _, shown = base64.b64decode(shown).partition(b":")
        except ValueError:
            return False
    return hmac.compare_digest(shown.strip(), key.strip().encode())  # a key read from a file may end a line


def as_response(error: ApiError, headers: dict[str, str] = {}) -> Response:  # noqa: B006
    return as_json(error.body, error.status, error.headers | headers)


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def build(engine: Engine, *, limits: Limits, images: Images) -> FastAPI:
    """The application, without its door and the page."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    default, started, model = engine.declared[0], int(time.time()), engine.name

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return as_response(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return as_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        LOG.error("%s failed", request.scope["state"]["id"], exc_info=error)
        return as_response(ApiError(500, "the server has an error; its log says more"))

    @app.get("/health")
    async def health() -> Response:
        status = "ok" if engine.ready else "failed" if engine.failure else "not ready"
        return as_json({"status": status}, 200 if engine.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        shown = prometheus_client.generate_latest(engine.metrics.registry)
        return Response(shown, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        return as_json({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != model:
            raise ApiError(404, f"there is no such model, only {model}", code="model_not_found")
        return as_json(card)

    @app.post(GENERATIONS)
    async def generations(request: Request) -> Response:
        check_type(request, "application/json")
        async with arriving(request, limits.body, limits.seconds) as chunks:
            body = b"".join([chunk async for chunk in chunks])
        return await answered(request, read_order(body, default, limits, model, engine.check))

    @app.post(EDITS)
    async def edits(request: Request) -> Response:
        check_origin(request)
        check_type(request, "multipart/form-data")
        async with arriving(request, limits.upload, limits.seconds) as chunks:
            values = await read_form(request.headers, chunks)
        loop, most = asyncio.get_running_loop(), most_references(engine.pipeline)
        read = functools.partial(read_edit, values, default, limits, model, engine.check, most)
        return await answered(request, await loop.run_in_executor(decoder, read))

    async def answered(request: Request, wanted: Order) -> Response:
        pngs = await made(request, submit(engine, wanted), limits.seconds)
        where = str(request.base_url).rstrip("/")
        data = [
            {"url": f"{where}{LINKS}{images.keep(png)}.png"}
            if wanted.links
            else {"b64_json": base64.b64encode(png).decode()}
            for png in pngs
        ]
        size = f"{wanted.settings.width}x{wanted.settings.height}"
        more = {"size": size, "output_format": "png", "seed": wanted.seed, "steps": wanted.settings.steps}
        return as_json({"created": int(time.time()), "data": data} | more)

    @app.get(LINKS + "{name}.png")
    async def file(name: str) -> Response:
        if (png := images.find(name)) is None:
            raise ApiError(404, "there is no such image; links expire")
        return Response(png, media_type="image/png", headers={"Cache-Control": "private, no-store"})

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def no_route(request: Request) -> Response:
        raise ApiError(404, f"there is no {request.method} {one_line(request.url.path)} here", code="unknown_url")

    card = {"id": model, "object": "model", "created": started, "owned_by": "arcflow", "loras": engine.loras}
    decoder = ThreadPoolExecutor(1, "decode")  # one image at a time, beside the other requests
    return app


def check_type(request: Request, kind: str) -> None:
    """Raises ApiError if the body is not said to be of this type.

    A web page of another site can send some types without asking; JSON its browser sends only if we allow it.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise ApiError(400, f"the Content-Type has to be {kind}")


def check_origin(request: Request) -> None:
    """Raises ApiError for a web page of another site, which can send a form without asking; its browser tells."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise ApiError(403, "a page of another site cannot ask for images")


@contextlib.asynccontextmanager
async def arriving(request: Request, most: int, seconds: float) -> AsyncGenerator[AsyncGenerator[bytes]]:
    """The parts of a body. Inside, raises ApiError if it has more than `most` bytes, or does not come."""

    async def chunks() -> AsyncGenerator[bytes]:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise ApiError(413, f"the body has more than {most} bytes", code="request_too_large")
            yield chunk

    try:
        async with asyncio.timeout(seconds):
            yield chunks()
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} s") from None
    except ClientDisconnect:
        raise ApiError(GONE, "the client went away") from None


def submit(engine: Engine, wanted: Order) -> list[Future[bytes]]:
    """Puts a request's images into the queue. Raises ApiError if they cannot get in."""
    try:
        return engine.submit(wanted.prompt, wanted.settings, wanted.seed, wanted.count, wanted.start)
    except Busy as busy:
        raise ApiError(429, str(busy), code="queue_full", retry=busy.seconds) from None
    except Closed as closed:
        raise ApiError(503, str(closed), code="not_ready", retry=5) from None


async def made(request: Request, futures: list[Future[bytes]], seconds: float) -> list[bytes]:
    """The PNGs. Raises ApiError on the deadline, or if the images cannot be made.

    If the client goes away, or the server ends, the images that are not yet in a batch are not made.
    """
    images = asyncio.ensure_future(results(futures))
    gone = asyncio.ensure_future(disconnected(request))
    try:
        done, _ = await asyncio.wait({images, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if images in done:
            return images.result()
        if gone in done:
            raise ApiError(GONE, "the client went away")
        raise ApiError(504, f"no image after {seconds:g} s", code="timeout", retry=5)
    except UserError as error:  # out of memory
        LOG.error("%s: %s", request.scope["state"]["id"], error)
        raise ApiError(503, "the device ran out of memory", code="out_of_memory", retry=5) from None
    except ApiError:
        raise
    except Exception:  # which the engine has logged
        raise ApiError(500, "the server has an error; its log says more") from None
    finally:
        gone.cancel()
        for future in futures:
            future.cancel()
        images.cancel()


async def results(futures: list[Future[bytes]]) -> list[bytes]:
    return [await asyncio.wrap_future(future) for future in futures]


async def disconnected(request: Request) -> None:
    """Returns once the client has gone away. The request's body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
