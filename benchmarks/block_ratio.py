"""Speed on this CPU of one full-width block of each kind of FLUX.1 and Qwen-Image, against diffusers, in float32.

    python -m benchmarks.block_ratio --rounds 3

The two frameworks' plain matrix products differ in speed on a CPU. So the report gives their ratio, measured in the
same rounds, beside the blocks' ratios. It also gives the time that a block spends beyond its matrix products: norms,
activations, softmax, rope and memory traffic. The two sides take turns, because a shared machine's speed drifts. Every
figure is the median of its rounds.
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
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformerBlock
from flax import nnx

from arcflow_jax.families.latents import centred_positions, position_ids
from arcflow_jax.networks.backbones import qwen_image
from arcflow_jax.networks.backbones.flux import DoubleBlock, FluxConfig, SingleBlock
from arcflow_jax.networks.layers import TEACHER
from arcflow_jax.networks.transformer import rotary
from arcflow_jax.training.work import flops

HEADS, HEAD_DIM, TEXT, ROWS = 24, 128, 512, 32
WIDTH, IMAGE = HEADS * HEAD_DIM, ROWS * ROWS
SIZE = {"in_channels": 64, "num_layers": 1, "attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS}
FLUX = FluxConfig(
    **SIZE, num_single_layers=1, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True
)
QWEN = qwen_image.QwenImageConfig(**SIZE, joint_attention_dim=3584)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def positions() -> np.ndarray:
    """Positions of text and image tokens, [S, 3]."""
    return np.concatenate([np.zeros((TEXT, 3), np.float32), np.asarray(position_ids(ROWS, ROWS))])


def ours(backward: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Blocking calls to time, and the floating-point operations of each one's matrix products."""
    work = {}
    rope = rotary(jnp.asarray(positions()), FLUX.axes_dims_rope)
    qwen_positions = qwen_image.joint_positions(jnp.asarray(centred_positions(ROWS, ROWS)), TEXT)
    qwen_rope = rotary(qwen_positions, QWEN.axes_dims_rope)
    temb = jnp.asarray(random(1, WIDTH))

    def timed(what: str, function: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
        call = jax.jit(function)
        work[what] = flops(call.trace(*arrays).jaxpr.jaxpr)
        return lambda: jax.block_until_ready(call(*arrays))

    def block(
        what: str, kind: type[nnx.Module], config: Any, inputs: tuple[np.ndarray, ...], *others: Any
    ) -> Callable[[], Any]:
        abstract = nnx.eval_shape(lambda: kind(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(abstract)
        state = jax.tree.map(lambda x: jnp.full(x.shape, 1 / WIDTH), state)  # the values do not affect the time

        def forward(state, *inputs):
            return nnx.merge(graphdef, state)(*inputs, temb, *others, TEACHER)

        def gradient(state, *inputs):
            out, vjp = jax.vjp(lambda *inputs: forward(state, *inputs), *inputs)
            return vjp(jax.tree.map(jnp.ones_like, out))

        return timed(what, gradient if backward else forward, state, *map(jnp.asarray, inputs))

    x, w = jnp.asarray(random(TEXT + IMAGE, WIDTH)), jnp.asarray(random(WIDTH, 4 * WIDTH))
    both = random(1, TEXT, WIDTH), random(1, IMAGE, WIDTH)
    calls = {
        "matrix product": timed("matrix product", jnp.matmul, x, w),
        "double block": block("double block", DoubleBlock, FLUX, both, rope),
        "single block": block("single block", SingleBlock, FLUX, (random(1, TEXT + IMAGE, WIDTH),), rope),
        "Qwen-Image block": block("Qwen-Image block", qwen_image.Block, QWEN, both, qwen_rope, jnp.array([TEXT])),
    }
    return calls, work


def theirs(backward: bool) -> dict[str, Callable[[], Any]]:
    rope = FluxPosEmbed(theta=10_000, axes_dim=list(FLUX.axes_dims_rope))(torch.from_numpy(positions()))
    qwen_rope = QwenEmbedRope(10_000, list(QWEN.axes_dims_rope), scale_rope=True)
    qwen_rope = qwen_rope((1, ROWS, ROWS), torch.device("cpu"), max_txt_seq_len=TEXT)
    temb = torch.from_numpy(random(1, WIDTH))

    def timed(kind: type[torch.nn.Module], rope: Any, **others: Any) -> Callable[[], Any]:
        with torch.device("meta"):
            block = kind(WIDTH, HEADS, HEAD_DIM).requires_grad_(False)
        block.to_empty(device="cpu")
        for parameter in block.parameters():
            parameter.fill_(1 / WIDTH)

        def call():
            text, image = inputs = [torch.from_numpy(x).requires_grad_(backward) for x in both]
            with torch.set_grad_enabled(backward):
                out = block(image, text, temb=temb, image_rotary_emb=rope, **others)
                return torch.autograd.grad(sum(y.sum() for y in out), inputs) if backward else out

        return call

    x, w = torch.from_numpy(random(TEXT + IMAGE, WIDTH)), torch.from_numpy(random(WIDTH, 4 * WIDTH))
    both = random(1, TEXT, WIDTH), random(1, IMAGE, WIDTH)
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    return {
        "matrix product": lambda: x @ w,
        "double block": timed(FluxTransformerBlock, rope),
        "single block": timed(FluxSingleTransformerBlock, rope),
        "Qwen-Image block": timed(QwenImageTransformerBlock, qwen_rope, encoder_hidden_states_mask=mask),
    }


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="also time the gradient with respect to the inputs")
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
            row = f"  {what:17}"
            for side in ("ours", "theirs"):
                beyond = medians[what, side] - work[what] / product * medians["matrix product", side]
                row += f" {side} {medians[what, side]:7.3f} s, beyond the products {beyond:6.3f} s  "
            print(f"{row} theirs / ours {medians[what, 'theirs'] / medians[what, 'ours']:.2f}")


if __name__ == "__main__":
    main()
