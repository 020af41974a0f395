"""The server from the outside: OpenAI's client, batches, limits, keys."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import jax
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from arcflow_jax.sampling_settings import batch_sizes
from arcflow_jax.serve import api, images
from arcflow_jax.serve.engine import Engine
from arcflow_jax.serve.metrics import Metrics
from arcflow_jax.serve.requests import Limits
from tests.serve.asking import GENERATIONS, PROMPT, ask, asked, difference, figures, opened, post
from tests.serve.conftest import wait_until

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
        assert difference(image, ask(client, prompt, seed)) <= 1  # in a batch of another size
        assert difference(image, engine.pipeline(prompt, seed=seed, height=32, width=64).images[0]) <= 1


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


def test_a_model_in_the_working_directory_has_a_name(engine, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(engine.pipeline.origin, "adapter", ".")
    shared = {"batch_size": 1, "wait": 0, "capacity": 1, "on_request": False, "metrics": Metrics(1)}
    assert Engine(engine.pipelines, declared=engine.declared, **shared).name == tmp_path.name


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
        # Its places in the queue are free as soon as the server knows
        wait_until(lambda: all(each.future.cancelled() for each in engine._queue))
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


def test_a_batch_that_fails(door, address, engine, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(engine.pipeline, "begin", failing)
        (answer,) = asked(door, post({"prompt": PROMPT}))
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert asked(door, post({"prompt": PROMPT}))[0].status_code == 200


def test_the_log_says_why_an_image_is_not_written(door, address, monkeypatch, caplog):
    def failing(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr("arcflow_jax.serve.engine.png", failing)
    (answer,) = asked(door, post({"prompt": PROMPT}))
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert "RuntimeError: secret" in caplog.text


# --- who may ask ---


def test_the_key(door, engine):
    locked = api.Door(door.app, "käse\n", engine.metrics)
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
