"""What the stages of the bundled teachers' training share: the training loop, and files of weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from safetensors import safe_open
from safetensors.flax import load_file, save

from arcflow_jax.storage.atomic import write_file

# Draws images [B, P, P, 3] in [-1, 1] and their attributes [B, A] from a key and B
Draw = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


def save_state(path: Path, state: nnx.State) -> None:
    """Writes every array of a state under its dotted path. The file appears whole or not at all."""
    flat = {".".join(map(str, key)): value[...] for key, value in nnx.to_flat_state(state)}
    write_file(path, save(flat))


def load_state(path: Path, module: nnx.Module) -> nnx.Module:
    """Fills a module from a file that `save_state` wrote."""
    saved = load_file(path)
    for key, value in nnx.to_flat_state(nnx.state(module)):
        value[...] = saved[".".join(map(str, key))].astype(value.dtype)
    return module


def save_progress(path: Path, step: int, progress: Any) -> None:
    """Writes a training loop's arrays after `step` steps. The file appears whole or not at all."""
    arrays = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(progress))}
    write_file(path, save(arrays, metadata={"step": str(step)}))


def load_progress(path: Path, like: Any) -> tuple[int, Any]:
    """The steps and the arrays that `save_progress` wrote, in the structure of `like`; 0 and `like` without a file."""
    if not path.exists():
        return 0, like
    with safe_open(path, "flax") as file:
        arrays = [file.get_tensor(str(i)) for i in range(len(jax.tree.leaves(like)))]
        return int(file.metadata()["step"]), jax.tree.unflatten(jax.tree.structure(like), arrays)


def psnr(mean_square: jax.Array | float) -> float:
    """Peak signal-to-noise ratio in dB, from the mean squared error of pixels in [-1, 1]."""
    return 10 * math.log10(4 / float(mean_square))


def adam(peak: float, horizon: int) -> optax.GradientTransformation:
    """Adam with warm-up, cosine decay to 1 % of the peak over `horizon` steps, and clipping at norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(200, horizon // 10), horizon, peak * 1e-2)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def train(
    loss: Callable[[nnx.State, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    state: nnx.State,
    *,
    steps: int,
    peak: float,
    horizon: int | None = None,
    every: int = 500,
    ema: float = 0.0,
    report: Callable[[nnx.State], dict[str, float]] = lambda state: {},
    seed: int = 1,
    result: Path | None = None,
) -> nnx.State:
    """Minimises `loss(state, key) -> (loss, values to print)` and returns the EMA weights.

    Prints the values, and what `report` makes of the EMA weights, every `every` steps. The learning rate decays over
    `horizon` steps, by default all of them. With a file `result`, it writes the weights there. Until then it saves its
    progress beside it, and resumes from there.
    """
    optimizer = adam(peak, horizon or steps)

    @jax.jit
    def step(state, average, opt_state, i):
        key = jax.random.fold_in(jax.random.key(seed), i)
        (_, values), grads = jax.value_and_grad(loss, has_aux=True)(state, key)
        updates, opt_state = optimizer.update(grads, opt_state, state)
        state = optax.apply_updates(state, updates)
        rate = 1 - jax.numpy.minimum(ema, i / (i + 10))
        average = optax.incremental_update(state, average, rate)
        return state, average, opt_state, values

    first, (state, average, opt_state) = 0, (state, state, optimizer.init(state))
    progress = result and result.with_suffix(".progress")
    if progress:
        first, (state, average, opt_state) = load_progress(progress, (state, average, opt_state))
    start = time.time()
    for i in range(first, steps):
        state, average, opt_state, values = step(state, average, opt_state, i)
        if (i + 1) % every == 0:
            shown = {**{name: float(value) for name, value in values.items()}, **report(average)}
            text = "  ".join(f"{name} {value:.5g}" for name, value in shown.items())
            print(f"{i + 1:6d} of {steps}  {time.time() - start:5.0f} s  {text}", flush=True)
            if progress:
                save_progress(progress, i + 1, (state, average, opt_state))
    if result:
        save_state(result, average)
        result.with_suffix(".progress").unlink(missing_ok=True)
    return average
