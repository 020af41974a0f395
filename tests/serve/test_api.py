"""The server from the outside: OpenAI's client, batches, limits, malformed requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import jax
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from arcflow_jax.sampling_settings import batch_sizes
from arcflow_jax.serve import api, images
from arcflow_jax.serve.engine import Engine
from arcflow_jax.serve.metrics import Metrics
from arcflow_jax.serve.requests import Limits
from tests.serve.conftest import LIMITS, wait_until

PROMPT = "a red circle on the left"
GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


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


JSON = {"Content-Type": "application/json"}


def figures(address: str) -> dict[str, float]:
    """The samples without labels that /metrics shows."""
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


# --- images ---


def test_openais_client(client, engine, served_model):
    answer = client.images.generate(prompt=PROMPT, n=2, size="64x32", model="student", extra_body={"seed": 7})
    shown = [opened(each.b64_json) for each in answer.data]
    expected = engine.pipeline(PROMPT, num_images_per_prompt=2, seed=7, height=32, width=64).images
    assert [difference(*pair) <= 1 for pair in zip(shown, expected, strict=True)] == [True, True]
    assert difference(*shown) > 20
    for i, (image, alone) in enumerate(zip(shown, expected, strict=True)):
        names = {"model": "teacher", "adapter": "student"}
        assert image.info == {name: str(value) for name, value in (alone.info | names | {"image": i}).items()}
        assert "secret-folder" not in str(image.info)
    assert (answer.size, answer.output_format, answer.seed) == ("64x32", "png", 7)
    assert [model.id for model in client.models.list()] == ["student"]
    assert client.models.retrieve("student").owned_by == "arcflow"


def test_links(client, address, monkeypatch):
    answer = client.images.generate(prompt=PROMPT, response_format="url", extra_body={"seed": 7})
    (url,) = [each.url for each in answer.data]
    assert url.startswith(f"{address}/v1/images/files/")
    assert "student" not in url
    found = httpx.get(url)
    assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(found.content)).size == (64, 32)
    assert httpx.get(url[:-5] + "x.png").status_code == 404
    now = images.time.monotonic()
    monkeypatch.setattr(images.time, "monotonic", lambda: now + 61)
    assert httpx.get(url).status_code == 404


def test_old_links_make_room(monkeypatch):
    monkeypatch.setattr(images, "LARGEST", 10)
    kept = images.Images(60)
    names = [kept.keep(b"1234") for _ in range(3)]
    assert [kept.find(name) for name in names] == [None, b"1234", b"1234"]


def test_a_seed_is_drawn_and_told(client):
    first, second = (client.images.generate(prompt=PROMPT) for _ in range(2))
    assert first.seed != second.seed
    again = client.images.generate(prompt=PROMPT, extra_body={"seed": first.seed})
    assert difference(opened(again.data[0].b64_json), opened(first.data[0].b64_json)) == 0


def test_images_in_a_batch_are_those_made_alone(client, address, engine, gate):
    requests = [(f"a {colour} circle", seed) for seed, colour in enumerate(["red", "green", "blue", "white", "gray"])]
    requests.append(("a blue ring", 2**64 - 1))
    before = figures(address)
    with ThreadPoolExecutor(len(requests)) as pool:
        first = pool.submit(ask, client, *requests[0])
        gate.wait_for(0)  # in a batch of its own
        rest = [pool.submit(ask, client, *each) for each in requests[1:]]
        gate.wait_for(5)
        gate.open()
        together = [future.result() for future in [first, *rest]]
    after = figures(address)
    assert after["arcflow_batch_images_count"] - before["arcflow_batch_images_count"] == 3  # 1 + 4 + 1
    assert after["arcflow_images_total"] - before["arcflow_images_total"] == 6
    assert gate.sizes == [1, 4, 1]
    for image, (prompt, seed) in zip(together, requests, strict=True):
        assert difference(image, ask(client, prompt, seed)) == 0
        assert difference(image, engine.pipeline(prompt, seed=seed, height=32, width=64).images[0]) <= 1


def ask(client, prompt: str, seed: int) -> Image.Image:
    return opened(client.images.generate(prompt=prompt, extra_body={"seed": seed}).data[0].b64_json)


def test_a_batch_has_the_smallest_size_that_holds_it(client, gate):
    gate.open()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        listener := lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        for count in (1, 2, 3, 4):
            client.images.generate(prompt=PROMPT, n=count)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert gate.sizes == [1, 2, 4, 4]
    assert not compiled  # all of it at the start


@pytest.mark.parametrize(
    ("mesh", "largest", "sizes"),
    [
        ((1, 1), 1, [1]),
        ((1, 1), 8, [8, 4, 2, 1]),
        ((1, 1), 6, [6, 4, 2, 1]),
        ((2, 3), 36, [36, 24, 12, 6]),
    ],
)
def test_sizes_of_batches(mesh, largest, sizes):
    split = SimpleNamespace(shape={"data": mesh[0], "fsdp": mesh[1]})
    assert batch_sizes(split, largest) == sizes


def test_images_that_are_given_up_as_they_are_taken_stop_nothing(engine, monkeypatch):
    """A client can go away between the look at the queue and the batch."""
    settings = engine.declared[0]
    idle = Engine(
        engine.pipelines, batch_size=1, wait=0, capacity=2, declared=[settings], on_request=False, metrics=Metrics(1)
    )
    idle._warm = 1
    (gone,), (waits,) = (idle.submit(PROMPT, settings, seed) for seed in (0, 1))
    monkeypatch.setattr(idle, "_forget_cancelled", lambda: None)
    gone.cancel()
    assert [each.future for each in idle._next(wait=True)] == [waits]


def test_other_settings_have_a_batch_of_their_own(client, address, engine, gate):
    before = figures(address)
    with ThreadPoolExecutor(3) as pool:
        pool.submit(ask, client, PROMPT, 0)
        gate.wait_for(0)
        guided = [
            pool.submit(client.images.generate, prompt=PROMPT, extra_body={"guidance": scale, "seed": 0})
            for scale in (1, 9)
        ]
        gate.wait_for(2)
        gate.open()
        one, nine = [opened(each.result().data[0].b64_json) for each in guided]
    assert figures(address)["arcflow_batch_images_count"] - before["arcflow_batch_images_count"] == 3
    assert [image.info["guidance"] for image in (one, nine)] == ["1.0", "9.0"]
    assert difference(one, nine) > 0


# --- too much, too late, not wanted any more ---


def test_a_full_queue(client, engine, gate):
    with ThreadPoolExecutor(3) as pool:
        pool.submit(ask, client, PROMPT, 0)
        gate.wait_for(0)
        full = pool.submit(client.images.generate, prompt=PROMPT, n=4)
        gate.wait_for(4)
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt=PROMPT, n=3)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "queue_full"
        gate.open()
        assert len(full.result().data) == 4
    # The official client tries again by itself
    assert client.with_options(max_retries=3).images.generate(prompt=PROMPT).data


def test_a_client_that_goes_away_gets_no_image(client, address, engine, gate):
    before = figures(address)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, PROMPT, 0)
        gate.wait_for(0)
        with pytest.raises(openai.APITimeoutError):
            client.images.generate(prompt=PROMPT, n=4, timeout=0.3)
        # Its places in the queue are free at once
        wait_until(
            lambda: figures(address)["arcflow_images_cancelled_total"] == before["arcflow_images_cancelled_total"]
        )
        late = pool.submit(client.images.generate, prompt=PROMPT, n=4)
        gate.open()
        assert first.result().size == (64, 32)
        assert len(late.result().data) == 4
    after = figures(address)
    assert after["arcflow_images_cancelled_total"] - before["arcflow_images_cancelled_total"] == 4
    assert after["arcflow_images_total"] - before["arcflow_images_total"] == 5


def test_a_deadline(engine, door, gate):
    hasty = api.build(engine, limits=Limits(4, 200, 4, 128**2, seconds=0.1), images=images.Images(60))
    (answer,) = asked(api.Door(hasty, None, engine.metrics), post({"prompt": PROMPT}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert "retry-after" in answer.headers


def test_a_batch_that_fails(door, engine, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(engine.pipeline, "begin", failing)
        (answer,) = asked(door, post({"prompt": PROMPT}))
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert asked(door, post({"prompt": PROMPT}))[0].status_code == 200


# --- who may ask ---


def test_the_key(door, engine):
    locked = api.Door(door.app, "käse", engine.metrics)
    basic = base64.b64encode("any:käse".encode()).decode()
    right = [{"Authorization": "Bearer käse".encode()}, {"Authorization": f"Basic {basic}"}]
    wrong = [{}, {"Authorization": "Bearer kase"}, {"Authorization": "Basic !"}, {"Authorization": "Bearer"}]
    for path in ("/v1/models", "/metrics", "/v1/images/generations", "/", "/nothing"):
        requests = [httpx.Request("GET", f"http://test{path}", headers=headers) for headers in right + wrong]
        answers = asked(locked, *requests)
        assert [answer.status_code == 401 for answer in answers] == [False, False, True, True, True, True], path
        assert answers[-1].json()["error"]["code"] == "invalid_api_key"
    requests = [httpx.Request("GET", f"http://test{path}") for path in ("/health", "/v1/images/files/x.png")]
    assert [answer.status_code for answer in asked(locked, *requests)] == [200, 404]


def test_no_other_site_may_read(address):
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(address + GENERATIONS, headers=headers)
    assert answer.status_code >= 400
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_every_answer_has_an_id(address):
    answers = [httpx.get(address + path) for path in ("/health", "/v1/models", "/nothing", "/health")]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 4
    assert all(name.startswith("req_") for name in ids)


# --- malformed requests ---

BAD = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"prompt": "\xff"}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "NaN": b'{"prompt": "x", "guidance": NaN}',
    "deep": b"[" * 100_000,
    "a list": [],
    "a text": "prompt",
    "null": None,
    "no prompt": {},
    "null as prompt": {"prompt": None},
    "a number as prompt": {"prompt": 3},
    "an empty prompt": {"prompt": " \n"},
    "a long prompt": {"prompt": "x" * 201},
    "n": {"prompt": "x", "n": 0},
    "many": {"prompt": "x", "n": 5},
    "very many": {"prompt": "x", "n": 10**30},
    "half": {"prompt": "x", "n": 1.5},
    "true": {"prompt": "x", "n": True},
    "a negative seed": {"prompt": "x", "seed": -1},
    "a large seed": {"prompt": "x", "seed": 2**64},
    "size": {"prompt": "x", "size": "large"},
    "a size with zeros": {"prompt": "x", "size": "0x64"},
    "a size that is not served": {"prompt": "x", "size": "64x64"},
    "an odd size": {"prompt": "x", "size": "65x33"},
    "a huge size": {"prompt": "x", "size": "99999x99999"},
    "steps": {"prompt": "x", "steps": 5},
    "steps that are not served": {"prompt": "x", "steps": 3},
    "guidance": {"prompt": "x", "guidance": -1},
    "a negative prompt for a student": {"prompt": "x", "negative_prompt": "y"},
    "response_format": {"prompt": "x", "response_format": "path"},
    "output_format": {"prompt": "x", "output_format": "webp"},
    "quality": {"prompt": "x", "quality": "hd"},
    "stream": {"prompt": "x", "stream": True},
    "an unknown field": {"prompt": "x", "step": 2},
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_malformed_bodies(door, body):
    (answer,) = asked(door, post(body))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "secret-folder" not in answer.text
    assert len(answer.text) < 1500


def test_the_field_at_fault_is_named(door):
    answers = asked(door, *[post({"prompt": "x", **wrong}) for wrong in ({"n": 9}, {"size": "64x64"}, {"seed": "a"})])
    assert [answer.json()["error"]["param"] for answer in answers] == ["n", "size", "seed"]
    assert "64x32" in answers[1].text  # what would be right


def test_other_refusals(door):
    def request(method, path, **more):
        return httpx.Request(method, f"http://test{path}", **more)

    expected = {
        400: [request("POST", GENERATIONS, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})],
        413: [post({"prompt": "x" * LIMITS.body})],
        404: [
            post({"prompt": "x", "model": "dall-e-3"}),
            request("GET", GENERATIONS),
            request("GET", "/v1/models/dall-e-3"),
            request("DELETE", "/v1/models/student"),
            request("POST", "/v1/images/nothing"),
            request("GET", "/v1/images/files/../../../../etc/passwd.png"),
            request("GET", "/docs"),
            request("GET", "/openapi.json"),
            request("GET", "/etc/passwd"),
        ],
    }
    for status, requests in expected.items():
        answers = asked(door, *requests)
        assert {answer.status_code for answer in answers} == {status}
        assert all(answer.json()["error"]["message"] for answer in answers)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
# A size that no one serves: the test is of what is refused
BODIES = st.dictionaries(st.sampled_from(["n", "seed", "steps", "guidance", "model", "user", "stream"]), VALUES).map(
    lambda body: {"prompt": "x", "size": "16x16"} | body
)


@settings(max_examples=100, deadline=None)
@given(body=BODIES | VALUES | st.binary(max_size=50))
def test_any_body_is_refused_in_order(door, body):
    (answer,) = asked(door, post(body))
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_control_codes_in_a_prompt(client):
    prompt = "a\x00red\x1b[31m circle \u202e\U0001f98a"
    assert ask(client, prompt, 0).info["prompt"] == prompt


def test_figures(address, client):
    client.images.generate(prompt=PROMPT)
    httpx.post(address + GENERATIONS, json={})
    text = httpx.get(f"{address}/metrics").text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"arcflow_requests", "arcflow_images", "arcflow_batch_seconds", "arcflow_request_seconds"} <= names
    found = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "arcflow_requests_total"
    }
    assert found[GENERATIONS, "200"] >= 1
    assert found[GENERATIONS, "400"] >= 1
    assert figures(address)["arcflow_ready"] == 1
