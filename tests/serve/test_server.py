"""`arcflow serve` as a process: two replicas, the log, and SIGTERM."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from arcflow_jax.data.output import png
from arcflow_jax.errors import UserError
from arcflow_jax.serve import requests
from arcflow_jax.serve.server import listening
from tests.helpers.command_line import assert_refused
from tests.helpers.loras import write_lora
from tests.helpers.paths import ROOT
from tests.helpers.processes import with_devices
from tests.serve.conftest import wait_until


def started(served_model, *options: object, log) -> tuple[subprocess.Popen, str]:
    """A server's process, and its address once it is ready."""
    model, adapter = served_model
    command = [sys.executable, ROOT / "tools" / "serve.py", "--port", 0, "--model", model, "--adapter", adapter]
    process = subprocess.Popen(
        [str(part) for part in [*command, *options]],
        env={**os.environ, **with_devices(2), "ARCFLOW_API_KEY": "a-long-key"},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    wait_until(lambda: "serving on" in log.read_text() or process.poll() is not None, 240)
    return process, re.search(r"serving on (\S+)", log.read_text())[1]


@pytest.mark.slow
def test_sigterm_finishes_what_waits(served_model, engine, tmp_path):
    log = tmp_path / "log"
    options = ["--sizes", "64x32", "--batch-size", 4, "--replicas", 2, "--wait-ms", 2000, "--no-page", "--edits"]
    options += ["--lora", f"{write_lora(tmp_path / 'grain.safetensors')}:0"]
    process, address = started(served_model, *options, log=log)
    try:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="a-long-key", max_retries=0, timeout=100)

        def image(seed: int) -> Image.Image:
            answer = client.images.generate(prompt="a red circle", extra_body={"seed": seed})
            return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))

        photo = png(Image.new("RGB", (64, 32), "red"))
        edit = client.images.edit(image=photo, prompt="a red circle", extra_body={"loras": {"grain": 1}})
        edited = Image.open(io.BytesIO(base64.b64decode(edit.data[0].b64_json)))
        assert (edited.info["loras"], edited.info["strength"]) == ("grain:1", "0.6")

        with ThreadPoolExecutor(11) as pool:
            waiting = [pool.submit(image, seed) for seed in range(11)]
            sent = httpx.Headers({"Authorization": "Bearer a-long-key"})
            metrics = f"{address}/metrics"
            # Eight fill two batches; three wait for a fourth, which does not come
            wait_until(lambda: "arcflow_waiting_images 3.0" in httpx.get(metrics, headers=sent).text)
            process.send_signal(signal.SIGTERM)
            made = [each.result() for each in waiting]
        alone = engine.pipeline(["a red circle"], seed=10, height=32, width=64).images[0]
        assert np.abs(np.asarray(made[10], np.int32) - np.asarray(alone, np.int32)).max() <= 1
        assert process.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            image(0)
    finally:
        process.kill()
    lines = log.read_text()
    assert len(re.findall(r"req_[0-9a-f]{24} POST /v1/images/generations 200", lines)) == 11
    assert "stopping" in lines
    assert "Traceback" not in lines


def test_an_address_that_is_taken():
    with listening("127.0.0.1", 0) as taken, pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1, port"):
        listening("127.0.0.1", taken.getsockname()[1])


def test_no_address_is_not_all_of_them():
    with pytest.raises(UserError, match=r"the host is empty"):
        listening("", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "64"], "size is '64', but has to be WIDTHxHEIGHT"),
        (["--sizes", "65x65"], "65"),
        (["--steps", "two"], "steps is 'two', but has to be a whole number"),
        (["--sizes", "4096x2048"], "4096x2048 in 2 steps is served, but --max-pixels 4194304 and .* refuse every"),
        (["--steps", "2,101"], "64x64 in 101 steps is served, but .* --max-steps 100 refuse every such request"),
        (["--compare", "--no-page"], "leave --no-page out"),
        (["--replicas", "1000"], "--replicas is 1000, but may be at most"),
        (["--mesh", "data=0"], "mesh 'data=0'"),
        (["--api-key", " "], "the API key is empty"),
    ],
)
def test_bad_options(capfd, tmp_path, served_model, options, message):
    model, adapter = served_model
    paths = ["--model", model, "--adapter", adapter]
    assert_refused(capfd, tmp_path, "serve", "--port", "0", *paths, *options, message=message)


def test_numbers():
    assert requests.numbers("2,4") == [2, 4]
