"""What a client may ask for, checked, and its errors in OpenAI's shape."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from arcflow_jax import schema
from arcflow_jax.errors import UserError
from arcflow_jax.sampling_settings import sides
from arcflow_jax.schema import NFE, Guidance, Offset, Seed
from arcflow_jax.serve.settings import Settings, Start

Asked = TypeVar("Asked", bound="Generation")
Images = Annotated[int, Meta(ge=1, le=10**6)]


class ApiError(Exception):
    """An error that a client gets.

    Args:
      status: of HTTP.
      message: one line, without the server's paths.
      code: for programs.
      param: the field at fault.
      retry: seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: int | None = None
    ):
        super().__init__(message)
        self.status, self.headers = status, {} if retry is None else {"Retry-After": str(retry)}
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server lets one client do.

    Attributes:
      images: in a request.
      prompt: characters of a prompt.
      steps: NFE.
      pixels: of an image.
      body: bytes of a request in JSON.
      upload: bytes of a request with images.
      seconds: until a request gets its answer, or the error that there is none.
    """

    images: int
    prompt: int
    steps: int
    pixels: int
    seconds: float
    body: int = 2**18
    upload: int = 2**25

    def check_served(self, settings: Sequence[Settings]) -> None:
        """Raises UserError if every request of some settings would be refused."""
        for each in settings:
            if each.width * each.height > self.pixels or each.steps > self.steps:
                raise UserError(
                    f"{each.width}x{each.height} in {each.steps} steps is served, but --max-pixels {self.pixels} and "
                    f"--max-steps {self.steps} refuse every such request: raise them"
                )


@dataclasses.dataclass(frozen=True)
class Generation:
    """The body of /v1/images/generations: OpenAI's fields, and ours."""

    prompt: str
    model: str | None = None
    n: Images | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    # Fields of OpenAI's that can only have the value that describes what we do
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    stream: Literal[False] | None = None
    user: str | None = None
    # Ours
    seed: Seed | None = None
    steps: NFE | None = None
    guidance: Guidance | None = None
    negative_prompt: str | None = None
    loras: dict[str, Offset] | None = None

    def __post_init__(self) -> None:
        schema.check(self)


@dataclasses.dataclass(frozen=True)
class Order:
    """A request's images: `count` of them, from noises 0 … of the seed, and from `start` if it has one, which may be
    reference images."""

    prompt: str
    settings: Settings
    seed: int
    count: int
    links: bool
    start: Start | None = None


def read_order(body: bytes, default: Settings, limits: Limits, model: str, check: Callable[[Settings], None]) -> Order:
    """What the body of a request asks for.

    Args:
      default: fills in what the request leaves out.
      model: the name of the model that is served.
      check: raises UserError on settings that are not served.

    Raises:
      ApiError: 400, or 404 for another model.
    """
    try:
        return order(parsed(Generation, decoded(body), model), default, limits, check)
    except UserError as error:
        raise bad_request(error) from None


def parsed(cls: type[Asked], values: Any, model: str) -> Asked:
    """The fields of a request. Raises UserError, or ApiError for another model than the one that is served."""
    asked = schema.parse(cls, values, "the request", own=True)
    if asked.model not in (None, model):
        message = f"model {schema.shown(asked.model)} is not served here, only {model}"
        raise ApiError(404, message, code="model_not_found", param="model")
    return asked


def order(
    asked: Generation,
    default: Settings,
    limits: Limits,
    check: Callable[[Settings], None],
    start: Start | None = None,
    strength: float | None = None,
    references: int = 0,
) -> Order:
    """What a request asks for, from an image with a strength, or from so many reference images.

    Raises UserError.
    """
    width, height = (default.width, default.height) if asked.size in (None, "auto") else sides(asked.size)
    steps, count = asked.steps or default.steps, asked.n or 1
    texts = [(name, text) for name in ("prompt", "negative_prompt") if (text := getattr(asked, name)) is not None]
    for name, value, most in [
        ("n", count, limits.images),
        ("steps", steps, limits.steps),
        *((name, len(text), limits.prompt) for name, text in texts),
    ]:
        if value > most:
            of = "" if name in ("n", "steps") else " characters long"
            raise UserError(f"{name} is {value}{of}, but may be at most {most}")
    if not asked.prompt.strip():
        raise UserError("prompt is empty: say in words what the image should show")
    if width * height > limits.pixels:
        raise UserError(f"size is {width}x{height}, but may have at most {limits.pixels} pixels")
    masked = start is not None and start.repaint is not None
    loras = None if asked.loras is None else tuple(sorted(asked.loras.items()))
    kind = (asked.negative_prompt, strength, masked, references, loras)
    settings = Settings(width, height, steps, asked.guidance, *kind)
    check(settings)
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    return Order(asked.prompt, settings, seed, count, asked.response_format == "url", start)


def decoded(body: bytes) -> Any:
    """The value of a JSON text. Raises UserError."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UserError(f"the body is not JSON: {error}") from None


def numbers(steps: str) -> list[int]:
    """NFEs of a text such as 2,4. Raises UserError."""
    parts = [int(part) if part.isdecimal() else part for part in filter(None, steps.split(","))]
    return [schema.converted(NFE, part, "steps") for part in parts]


def bad_request(error: UserError, cls: type[Generation] = Generation) -> ApiError:
    """A client's fault, as an answer; `param` is the field of `cls` that the message begins with."""
    message = str(error).removeprefix("the request: ")
    first = re.split(r"\W", message, maxsplit=1)[0]
    return ApiError(400, message, param=first if first in cls.__dataclass_fields__ else None)
