"""Speed of one full-width FLUX.1 block of each kind on this CPU against diffusers', in float32.

    python benchmarks/block_ratio.py --rounds 3

The two frameworks' plain matrix products differ in speed on a CPU, so their ratio, measured in the same rounds, stands
beside the blocks' ratios; and what a block takes beyond its own products at that product's rate: norms, activations,
softmax, rope, and moving data. Measurements take turns, because a shared machine's speed drifts; every figure is the
median of its rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from flax import nnx

from arcflow_jax.compile_report.work import flops
from arcflow_jax.latents import position_ids
from arcflow_jax.layers import TEACHER
from arcflow_jax.models.flux import DoubleBlock, FluxConfig, SingleBlock, rotary

HEADS, HEAD_DIM, TEXT, ROWS = 24, 128, 512, 32
WIDTH, IMAGE = HEADS * HEAD_DIM, ROWS * ROWS
CONFIG = FluxConfig(
    in_channels=64,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=HEAD_DIM,
    num_attention_heads=HEADS,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def positions() -> np.ndarray:
    """Of text and image tokens, [S, 3]."""
    return np.concatenate([np.zeros((TEXT, 3), np.float32), np.asarray(position_ids(ROWS, ROWS))])


def ours(backward: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Each thing to time, as a call that returns when it is done; and its floating-point operations in products."""
    work = {}
    rope = rotary(jnp.asarray(positions()), CONFIG.axes_dims_rope)
    temb = jnp.asarray(random(1, WIDTH))

    def timed(what: str, function: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
        call = jax.jit(function)
        work[what] = flops(call.trace(*arrays).jaxpr.jaxpr)
        return lambda: jax.block_until_ready(call(*arrays))

    def block(what: str, kind: type[nnx.Module], *inputs: np.ndarray) -> Callable[[], Any]:
        abstract = nnx.eval_shape(lambda: kind(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(abstract)
        state = jax.tree.map(lambda x: jnp.full(x.shape, 1 / WIDTH), state)  # no time depends on the values

        def forward(state, *inputs):
            return nnx.merge(graphdef, state)(*inputs, temb, rope, TEACHER)

        def gradient(state, *inputs):
            out, vjp = jax.vjp(lambda *inputs: forward(state, *inputs), *inputs)
            return vjp(jax.tree.map(jnp.ones_like, out))

        return timed(what, gradient if backward else forward, state, *map(jnp.asarray, inputs))

    x, w = jnp.asarray(random(TEXT + IMAGE, WIDTH)), jnp.asarray(random(WIDTH, 4 * WIDTH))
    calls = {
        "matrix product": timed("matrix product", jnp.matmul, x, w),
        "double block": block("double block", DoubleBlock, random(1, TEXT, WIDTH), random(1, IMAGE, WIDTH)),
        "single block": block("single block", SingleBlock, random(1, TEXT + IMAGE, WIDTH)),
    }
    return calls, work


def theirs(backward: bool) -> dict[str, Callable[[], Any]]:
    rope = FluxPosEmbed(theta=10_000, axes_dim=list(CONFIG.axes_dims_rope))(torch.from_numpy(positions()))
    temb = torch.from_numpy(random(1, WIDTH))

    def timed(kind: type[torch.nn.Module], text: np.ndarray, image: np.ndarray) -> Callable[[], Any]:
        with torch.device("meta"):
            block = kind(WIDTH, HEADS, HEAD_DIM).requires_grad_(False)
        block.to_empty(device="cpu")
        for parameter in block.parameters():
            parameter.fill_(1 / WIDTH)

        def call():
            inputs = [torch.from_numpy(x).requires_grad_(backward) for x in (text, image)]
            with torch.set_grad_enabled(backward):
                out = block(encoder_hidden_states=inputs[0], hidden_states=inputs[1], temb=temb, image_rotary_emb=rope)
                return torch.autograd.grad(sum(y.sum() for y in out), inputs) if backward else out

        return call

    x, w = torch.from_numpy(random(TEXT + IMAGE, WIDTH)), torch.from_numpy(random(WIDTH, 4 * WIDTH))
    inputs = random(1, TEXT, WIDTH), random(1, IMAGE, WIDTH)
    return {
        "matrix product": lambda: x @ w,
        "double block": timed(FluxTransformerBlock, *inputs),
        "single block": timed(FluxSingleTransformerBlock, *inputs),
    }


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="also the gradient by the inputs")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    for backward in (False, True) if arguments.backward else (False,):
        mine, work = ours(backward)
        calls = {"ours": mine, "theirs": theirs(backward)}
        times: dict[tuple[str, str], list[float]] = {}
        for i in range(arguments.rounds + 1):
            for what in calls["ours"]:
                for side in ("ours", "theirs"):
                    taken = seconds(calls[side][what])
                    if i:  # the first round compiles and warms up
                        times.setdefault((what, side), []).append(taken)
        print("forward and backward" if backward else "forward")
        medians = {key: statistics.median(values) for key, values in times.items()}
        product = work["matrix product"]
        for what in work:
            row = f"  {what:15}"
            for side in ("ours", "theirs"):
                beyond = medians[what, side] - work[what] / product * medians["matrix product", side]
                row += f" {side} {medians[what, side]:7.3f} s, beyond the products {beyond:6.3f} s  "
            print(f"{row} theirs / ours {medians[what, 'theirs'] / medians[what, 'ours']:.2f}")


if __name__ == "__main__":
    main()
