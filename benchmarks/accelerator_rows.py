"""The rows of `benchmarks.accelerator`: each returns its figures, or raises `Skipped`."""

# B batch, S tokens, H heads, E head dim

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from arcflow_jax.compile_report.programs import PLAIN, PROGRAMS, Program, WeightOptions, open_model
from arcflow_jax.compile_report.topology import HostSharding
from arcflow_jax.demo import ASSETS
from arcflow_jax.generate import sample_teacher
from arcflow_jax.networks import attention as kernels
from arcflow_jax.networks.quantization import compute_in
from arcflow_jax.parallel.chips import GIB
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.parallel.offload import HOST
from arcflow_jax.storage.files import read_json
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe, read_config
from arcflow_jax.training.work import flops, speed

ROOT = Path(__file__).parents[1]
ROUNDS = 5
Row = dict[str, Any]


class Skipped(Exception):
    """A row cannot run here."""


def recipe(tiny: bool) -> Recipe:
    """The recipe of the model that the rows run."""
    config = read_config("tiny" if tiny else "flux")
    config.model = str(ASSETS / "tiny-flux" if tiny else ROOT / "configs" / "flux.1-dev")
    config.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Recipe.from_config(config)


def one_device() -> Mesh:
    return make_mesh((1, 1, 1, 1), jax.devices()[:1])


def seconds(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """The median time of a call, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def filled(tree: Any) -> Any:
    """Arrays for shapes with shardings: numbers that take no memory to make, small enough to stay finite."""

    def value(path: Any, x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), x.sharding)
        name = jax.tree_util.keystr(path)
        least, most = (0, 8) if x.dtype == jnp.int32 else (-0.02, 0.02)  # token ids; weights and inputs
        if x.dtype.itemsize == 1:
            least, most = -100, 100  # codes
        elif "kernel" in name and "scale" in name:
            least, most = 0, 1e-4

        def make() -> jax.Array:
            bits = (jax.lax.iota(jnp.uint32, math.prod(x.shape)) * np.uint32(2654435761)) >> 16
            return (least + bits.astype(jnp.float32) / 2**16 * (most - least)).astype(x.dtype).reshape(x.shape)

        made = jax.jit(make, out_shardings=NamedSharding(x.sharding.mesh, x.sharding.spec))()
        on_host = isinstance(x.sharding, HostSharding)
        return jax.device_put(made, made.sharding.with_memory_kind(HOST)) if on_host else made

    return jax.tree_util.tree_map_with_path(value, tree)


def finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))


def measured(run: Callable[[], Any], work: int) -> Row:
    """Seconds, speed and peak memory of a call that does `work` operations."""
    time_of = seconds(run)
    stats = jax.devices()[0].memory_stats() or {}
    found = {"seconds": time_of, **speed(work / time_of * jax.device_count()), "finite": finite(run())}
    return found | ({"peak_gib": stats["peak_bytes_in_use"] / GIB} if "peak_bytes_in_use" in stats else {})


def program_row(name: str, tiny: bool, weights: WeightOptions = PLAIN, compute: Any = None) -> Row:
    """A program of compile-report, run."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        program = PROGRAMS[name](recipe(tiny), mesh, 1, weights)
        graphdef, *rest = filled_arguments(program)
        if compute is not None:
            model = nnx.merge(graphdef, rest[0])
            compute_in(model, compute)
            graphdef = nnx.graphdef(model)
        arguments = (graphdef, *rest)
        work = flops(program.function.trace(*arguments, **program.keywords).jaxpr.jaxpr)
        return measured(lambda: program.function(*arguments, **program.keywords), work)


def filled_arguments(program: Program) -> list[Any]:
    """A program's arguments with arrays in place of shapes; a graph definition stays."""
    return [x if isinstance(x, nnx.GraphDef) else filled(x) for x in program.arguments]


def forward(tiny: bool) -> Row:
    """One call of the teacher, as one Euler step."""
    mesh, settings = one_device(), recipe(tiny)
    directory = open_model(settings.model)
    with jax.set_mesh(mesh):
        _, _, latents, conditioning, *_ = filled_arguments(PROGRAMS["sampler"](settings, mesh, 1, PLAIN))
        graphdef, state = nnx.split(directory.abstract("transformer", jnp.dtype(settings.dtype)))
        state = filled(PLAIN.place(mesh, state))
        call = functools.partial(sample_teacher, graphdef, state, latents, conditioning, jnp.float32(3), None, steps=1)
        work = flops(jax.jit(lambda: call()).trace().jaxpr.jaxpr)
        return measured(call, work)


def training(batch: int, tiny: bool, quantize: Any = None) -> Row:
    """A later training step of the recipe, with the remat policy that fits this device."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        program = PROGRAMS["train-steady"](recipe(tiny), mesh, batch, WeightOptions(quantize))
        state, *others = filled_arguments(program)
        work = flops(program.function.trace(state, *others, **program.keywords).jaxpr.jaxpr)
        kept = [state]

        def step() -> Any:
            kept[0], log = program.function(kept[0], *others, **program.keywords)
            return log["loss"]

        return measured(step, work) | {"remat": program.keywords["remat"]}


def tiny_training(tiny: bool) -> Row:
    """Twenty training steps of the bundled teacher in bfloat16, by the recipe but for the number of steps."""
    config = read_config("tiny")
    with tempfile.TemporaryDirectory() as folder:
        config.update(out=f"{folder}/run", steps=20, dtype="bfloat16", preview_every=0, log_every=1)
        config.batch = 4 if tiny else 32
        start = time.perf_counter()
        train(Recipe.from_config(config))
        losses = [json.loads(line)["loss"] for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    return {"seconds": time.perf_counter() - start, "finite": bool(np.isfinite(losses).all()), "last loss": losses[-1]}


def matrix_product(tiny: bool) -> Row:
    """The rate of a plain product, which the other rows are compared with."""
    n = 512 if tiny else 8192
    dtype = jnp.dtype(recipe(tiny).dtype)
    a, b = (jax.random.normal(jax.random.key(i), (n, n)).astype(dtype) for i in (0, 1))
    return measured(functools.partial(jax.jit(jnp.matmul), a, b), 2 * n**3)


def attention_row(name: str, backward: bool, lengths: bool, meshed: bool, tiny: bool) -> Row:
    """A kernel against float32 arithmetic: the largest error relative to the largest value, and its time."""
    platform = jax.default_backend()
    if {"cudnn": "gpu", "splash": "tpu"}.get(name, platform) != platform:
        raise Skipped(f"no {name} on {platform}")
    if meshed and jax.device_count() == 1:
        raise Skipped("one device")
    mesh = make_mesh((1, 1, jax.device_count() if meshed else 1, 1), jax.devices()[: None if meshed else 1])
    shape = (1, 200, 2, 128) if tiny else (1, 4608, 24, 128)
    dtype = jnp.bfloat16 if platform != "cpu" else jnp.float32
    exact = [jax.random.normal(jax.random.key(i), shape) for i in range(4)]
    length = jnp.array([shape[1] - 77]) if lengths else None

    def call(kernel: str, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            with kernels.attention_kernel(kernel):
                return kernels.attention(q, k, v, length)

        if not backward:
            return attend(q, k, v)
        return jax.vjp(attend, q, k, v)[1](seen)

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(call, "chunked"))(*exact)
    with jax.set_mesh(mesh):
        run = functools.partial(jax.jit(functools.partial(call, name)), *(x.astype(dtype) for x in exact))
        made = run()
        pairs = list(zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True))
        errors = [float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max()) for x, y in pairs]
        b, s, h, e = shape
        return measured(run, (14 if backward else 4) * b * h * s * s * e) | {"error": max(errors)}


def whole_path(tiny: bool) -> Row:
    """From token ids to pixels: the largest text encoder, the sampler and the VAE's decoder, all on the device."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        programs = [PROGRAMS[name](recipe(tiny), mesh, 1, PLAIN) for name in ("text-encoder", "sampler", "vae-decoder")]
        calls = [functools.partial(each.function, *filled_arguments(each), **each.keywords) for each in programs]
        work = sum(flops(each.function.trace(*each.arguments, **each.keywords).jaxpr.jaxpr) for each in programs)
        return measured(lambda: [call() for call in calls], work)


def diffusers_forward(compiled: bool, tiny: bool) -> Row:
    """diffusers' transformer of the same size, on the same device."""
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed") from None
    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        raise Skipped("PyTorch sees no GPU")
    device, dtype = ("cpu", torch.float32) if jax.default_backend() == "cpu" else ("cuda", torch.bfloat16)
    config = read_json(Path(recipe(tiny).model) / "transformer" / "config.json")
    with torch.device(device):
        model = diffusers.FluxTransformer2DModel.from_config(config).to(dtype).eval()
    n, text = (16, 16) if tiny else (4096, 512)
    random = functools.partial(torch.randn, device=device, dtype=dtype)
    inputs = {
        "hidden_states": random(1, n, config["in_channels"]),
        "encoder_hidden_states": random(1, text, config["joint_attention_dim"]),
        "pooled_projections": random(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "guidance": torch.tensor([3.5], device=device) if config["guidance_embeds"] else None,
        "img_ids": torch.zeros(n, 3, device=device),
        "txt_ids": torch.zeros(text, 3, device=device),
    }
    run = torch.compile(model) if compiled else model

    def call() -> None:
        with torch.no_grad():
            run(**inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    found = {"seconds": seconds(call)}
    return found | ({"peak_gib": torch.cuda.max_memory_allocated() / GIB} if device == "cuda" else {})


def first_image(tiny: bool) -> Row:
    """Seconds from the start of a process to the first latents, without and with compiled programs on the disk."""
    times = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            start = time.perf_counter()
            settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            subprocess.run(command("sampler", tiny), env={**os.environ, **settings}, check=True, capture_output=True)
            times[name] = time.perf_counter() - start
    return {"seconds": times["warm"], "cold_seconds": times["cold"]}


def command(name: str, tiny: bool) -> list[str]:
    """Runs one row, whose last line is its figures as JSON."""
    return [sys.executable, "-m", "benchmarks.accelerator", "--row", name, *(["--tiny"] if tiny else [])]


def attention_rows(tiny: bool) -> dict[str, Callable[[], Row]]:
    cases = {"": (False, False, False), ", backward": (True, False, False)}
    cases |= {", backward, lengths": (True, True, False), ", backward, lengths, all devices": (True, True, True)}
    return {
        f"attention: {name}{text}": functools.partial(attention_row, name, *case, tiny)
        for name in ("xla", "chunked", "cudnn", "splash")
        for text, case in cases.items()
    }


def rows(tiny: bool) -> dict[str, Callable[[], Row]]:
    """All rows by name, the quick ones first."""
    found: dict[str, Callable[[], Row]] = {"matrix product": functools.partial(matrix_product, tiny)}
    found |= attention_rows(tiny)
    found["20 tiny training steps in bfloat16"] = functools.partial(tiny_training, tiny)
    found["forward"] = functools.partial(forward, tiny)
    found["diffusers forward"] = functools.partial(diffusers_forward, False, tiny)
    found["diffusers forward, torch.compile"] = functools.partial(diffusers_forward, True, tiny)
    run = functools.partial(program_row, "sampler", tiny)
    found["sampler"] = run
    for format in ("int8", "fp8", "int4"):
        found[f"sampler, {format} weights"] = functools.partial(run, WeightOptions(format))
        if format != "int4":
            found[f"sampler, {format} weights and products"] = functools.partial(run, WeightOptions(format), format)
    found["sampler, blocks in host memory"] = functools.partial(run, WeightOptions(offload="blocks"))
    found["sampler, int8 blocks in host memory"] = functools.partial(run, WeightOptions("int8", "blocks"))
    found["token ids to image"] = functools.partial(whole_path, tiny)
    for batch in (1, 4, 8):
        found[f"training step, batch {batch}"] = functools.partial(training, batch, tiny)
    found["training step, batch 1, int8 base"] = functools.partial(training, 1, tiny, "int8")
    found["first image"] = functools.partial(first_image, tiny)
    return found
