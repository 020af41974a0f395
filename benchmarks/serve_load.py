"""What `arcflow serve` costs beside the pipeline that it runs, and whether it loses requests.

    python -m benchmarks.serve_load [--model DIR --adapter DIR] [--size 64x64] [--batch-size 8] [--images 400]
    python -m benchmarks.serve_load --soak 10000 --size 32x32

Converts the bundled teacher and gives it a random student, unless a model is named; starts the server as a process on
127.0.0.1, and asks it from this process, on as many cores as there are.

Without --soak: images a second and p50 and p99 of the latency with 1, 8 and 32 clients; beside them those of
`ArcFlowPipeline.stream` and of the jitted sampler alone, at the same batch size, measured before the server starts.
Other work on the machine slows all of them down, and so do the clients, which share its cores. So processor time is
shown too, that of the server and that of the clients: images per second of the server's processor time compare with
images per second of the pipeline's.

With --soak: so many requests, 2 % of them malformed and 2 % given up by their clients, and in the middle one SIGTERM
with a new start on the same port. Counts what was answered, and compares every image with the first of its seed. They
may differ by one level of 255: batches of several sizes are several programs, which round differently.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import jax
import numpy as np
from PIL import Image

from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.serve.requests import sides
from arcflow_jax.storage import cache

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle on the left"
ROUTE = "/v1/images/generations"
SEEDS = 50  # different images of the soak


def bundled(folder: Path) -> tuple[Path, Path]:
    """The bundled teacher, converted, and a student of random weights."""
    from arcflow_jax.demo import ASSETS
    from arcflow_jax.models.conversion import convert_model
    from tests.helpers.random_student import write_adapter

    convert_model(ASSETS / "tiny-flux", folder / "teacher")
    return folder / "teacher", write_adapter(folder / "teacher", folder / "student", seed=0)


def rate(make, images: int, batch: int) -> tuple[float, float]:
    """Images a second, and a second of processor time."""
    make()
    start, used, runs = time.perf_counter(), time.process_time(), max(3, images // batch)
    for _ in range(runs):
        make()
    return runs * batch / (time.perf_counter() - start), runs * batch / (time.process_time() - used)


def bare(model: Path, adapter: Path, size: str, batch: int, images: int) -> None:
    """Prints the throughput without a server."""
    pipe = ArcFlowPipeline.from_pretrained(model, adapter)
    width, height = sides(size)
    rows, columns = pipe.grid(height, width)
    settings = pipe.settings(height=height, width=width)
    noise = np.asarray(pipe.noise(0, batch, rows, columns))
    prompts = [PROMPT] * batch
    conditioning = pipe.encode(prompts, guidance=settings.guidance, rows=rows, columns=columns)
    alone = rate(lambda: jax.block_until_ready(pipe.denoise(noise, conditioning, settings.steps)), images, batch)
    whole = rate(
        lambda: list(pipe.stream(prompts, latents=noise, batch_size=batch, height=height, width=width)), images, batch
    )
    for name, (speed, per_core) in {"jitted sampler alone": alone, "text, sampler and decoder": whole}.items():
        print(f"{name:26s}: {speed:7.1f} images/s, {per_core:7.1f} per second of processor time", flush=True)


def start(options: argparse.Namespace, model: Path, adapter: Path, port: int) -> subprocess.Popen:
    """A server that is ready."""
    command = [sys.executable, ROOT / "tools" / "serve.py", "--model", model, "--adapter", adapter, "--port", port]
    command += ["--batch-size", options.batch_size, "--queue", 256, "--no-page", "--sizes", options.size]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise SystemExit("the server did not start")


def stop(process: subprocess.Popen) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def processor_seconds(process: subprocess.Popen) -> float:
    """What a running process has used, on Linux."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(port: int, clients: int, images: int) -> tuple[float, list[float]]:
    """Images a second, and the latencies, with so many clients, each of which asks again when it has its image.

    They write and read bytes: a library for HTTP would use as much of the processor as the server does.
    """
    took: list[float] = []
    left = iter(range(images))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for seed in left:
            body = json.dumps({"prompt": PROMPT, "seed": seed})
            head = f"POST {ROUTE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            begin = time.perf_counter()
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
            if length is None or not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"the server answered {answer!r}")
            await reader.readexactly(int(length[1]))
            took.append(time.perf_counter() - begin)
        writer.close()

    begin = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(clients)])
    return images / (time.perf_counter() - begin), took


async def soak(url: str, requests: int, restart) -> Counter:
    """What became of the requests."""
    counts: Counter = Counter()
    known: dict[int, np.ndarray] = {}
    draw = random.Random(0)
    kinds = draw.choices(["good", "malformed", "given up"], [96, 2, 2], k=requests)
    left = iter(enumerate(kinds))
    bodies = [{}, {"prompt": ""}, {"prompt": "x", "n": 0}, {"prompt": "x", "size": "1x1"}, [], {"prompt": "x", "a": 1}]

    async def one(http: httpx.AsyncClient, number: int, kind: str) -> None:
        if kind == "malformed":
            answer = await http.post(url, json=bodies[number % len(bodies)])
            counts["malformed, " + ("refused" if answer.status_code == 400 else f"WRONG {answer.status_code}")] += 1
            return
        seed = number % SEEDS
        timeout = 0.02 if kind == "given up" else 120
        try:
            answer = await http.post(url, json={"prompt": PROMPT, "seed": seed}, timeout=timeout)
        except httpx.TimeoutException:
            counts["given up by the client" if kind == "given up" else "LOST"] += 1
            return
        if answer.status_code in (429, 503):
            raise httpx.ConnectError("try again")
        answer.raise_for_status()
        png = base64.b64decode(answer.json()["data"][0]["b64_json"])
        found = np.asarray(Image.open(io.BytesIO(png)), np.int32)
        apart = np.abs(known.setdefault(seed, found) - found).max()
        counts["right" if apart == 0 else "right, one level apart" if apart == 1 else "WRONG IMAGE"] += 1

    async def client() -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            for number, kind in left:
                if number == requests // 2:
                    counts[f"restart, exit code {await asyncio.to_thread(restart)}"] += 1
                for _ in range(2000):
                    try:
                        await one(http, number, kind)
                        break
                    except (httpx.ConnectError, httpx.RemoteProtocolError) as error:
                        # While no server listens, and where a kept connection has been closed before it was used
                        counts[f"tried again: {type(error).__name__}"] += 1
                        await asyncio.sleep(0.1)
                else:
                    counts["LOST"] += 1

    await asyncio.gather(*[client() for _ in range(32)])
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", default="64x64", help="width x height")
    parser.add_argument("--images", type=int, default=400, help="for each figure")
    parser.add_argument("--soak", type=int, default=0, help="requests of the soak, instead of the figures")
    options = parser.parse_args()
    cache.enable_compilation_cache()
    with socket.create_server(("127.0.0.1", 0)) as free, tempfile.TemporaryDirectory() as folder:
        port = free.getsockname()[1]
        free.close()
        model, adapter = (options.model, options.adapter) if options.model else bundled(Path(folder))
        url = f"http://127.0.0.1:{port}{ROUTE}"
        if not options.soak:
            bare(model, adapter, options.size, options.batch_size, options.images)
        process = [start(options, model, adapter, port)]
        try:
            if options.soak:

                def restart() -> int:
                    code = stop(process[0])
                    process[0] = start(options, model, adapter, port)
                    return code

                begin = time.perf_counter()
                counts = asyncio.run(soak(url, options.soak, restart))
                print(f"{options.soak} requests in {time.perf_counter() - begin:.0f} s")
                for name, count in sorted(counts.items()):
                    print(f"{count:7d} {name}")
                return
            asyncio.run(load(port, 32, 2 * 32))
            for clients in (1, 8, 32):
                before, own = processor_seconds(process[0]), time.process_time()
                speed, took = asyncio.run(load(port, clients, options.images))
                used, own = processor_seconds(process[0]) - before, time.process_time() - own
                cuts = statistics.quantiles(took, n=100)
                print(
                    f"{clients:3d} clients: {speed:7.1f} images/s, p50 {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s, "
                    f"{options.images / used:7.1f} per second of the server's processor time; "
                    f"an image took {1000 * used / options.images:.1f} ms of it, {1000 * own / options.images:.1f} ms "
                    "of the clients'",
                    flush=True,
                )
        finally:
            print("exit code of the server", stop(process[0]))


if __name__ == "__main__":
    main()
