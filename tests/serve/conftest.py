"""One small model behind a server in this process, which all tests of the room share."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.serve import api
from arcflow_jax.serve.engine import Engine
from arcflow_jax.serve.images import Images
from arcflow_jax.serve.metrics import Metrics
from arcflow_jax.serve.requests import Limits
from arcflow_jax.serve.server import listening
from arcflow_jax.serve.settings import declared
from tests.helpers.loras import write_lora
from tests.helpers.random_student import write_adapter

LIMITS = Limits(images=4, prompt=200, steps=4, pixels=128 * 128, seconds=60)


@pytest.fixture(scope="session")
def served_model(tiny_flux, tmp_path_factory) -> tuple[Path, Path]:
    """The teacher and a student of random weights."""
    model = shutil.copytree(tiny_flux, tmp_path_factory.mktemp("secret-folder") / "teacher")
    return model, write_adapter(model, model.with_name("student"), seed=0)


@pytest.fixture(scope="session")
def engine(served_model) -> Iterator[Engine]:
    pipe = ArcFlowPipeline.from_pretrained(*served_model)
    pipe.load_lora_weights(write_lora(served_model[0].with_name("grain.safetensors")), scale=0.0)
    engine = Engine(
        [pipe],
        batch_size=4,
        wait=0.05,
        capacity=6,
        declared=declared(pipe, [(64, 32)], [], edits=True),
        on_request=False,
        metrics=Metrics(4),
    )
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def door(engine) -> api.Door:
    return api.Door(api.build(engine, limits=LIMITS, images=Images(60)), None, engine.metrics)


@pytest.fixture(scope="session")
def address(door) -> Iterator[str]:
    """Where the server listens."""
    with served(door) as address:
        yield address


@pytest.fixture(scope="module")
def client(address) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def served(door: api.Door) -> Iterator[str]:
    """Answers in a thread of this process. Yields the address."""
    server = uvicorn.Server(uvicorn.Config(door, log_level="warning", timeout_graceful_shutdown=5))
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 200)
        yield address
        server.should_exit = True
        thread.join()


def wait_until(condition, seconds: float = 120.0) -> None:
    """Waits for something that another thread or process does. Fails if it does not come."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it did not come")


class Gate:
    """Holds every batch until `open`. Keeps their sizes, as they are filled up."""

    def __init__(self, engine: Engine):
        self.engine, self.begin, self.opened = engine, engine.pipeline.begin, threading.Event()
        self.sizes: list[int] = []

    def __call__(self, prompts, noise, **named):
        self.sizes.append(len(noise))
        assert self.opened.wait(60)
        return self.begin(prompts, noise, **named)

    def wait_for(self, waiting: int) -> None:
        """Until a batch is held, and so many images wait behind it."""
        wait_until(lambda: self.sizes and len(self.engine._queue) == waiting)

    def open(self) -> None:
        self.opened.set()


@pytest.fixture
def gate(engine, monkeypatch) -> Iterator[Gate]:
    gate = Gate(engine)
    monkeypatch.setattr(engine.pipeline, "begin", gate)
    yield gate
    gate.open()
    wait_until(lambda: not engine._queue)
