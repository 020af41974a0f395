"""One training step of distillation against the same algorithm in PyTorch (diffusers, peft), on a small float32 FLUX.

    python -m benchmarks.train_step --rounds 5

Both sides start from the same weights and get the same random numbers, so their losses must agree, which is checked.
Each side runs in its own process, so that its peak memory is its own. They take turns step by step, because a shared
machine's speed drifts. Both recompute each block in the backward pass. Times are medians over the rounds. Memory is
the peak resident set without what the imports took.
"""

# B batch, N tokens, D features of a token, K modes, M visited states

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

# FLUX.1's LoRA targets by the names of PyTorch
THEIR_TARGETS = (
    r"single_transformer_blocks\.\d+\.proj_(mlp|out)|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)"
    r"|time_text_embed\.timestep_embedder\.linear_[12]"
)
NFE, SHIFT, STATES, WINDOW, SUBSTEPS, MODE_DROPOUT, LOSS_SCALE = 2, 3.2, 4, 3, 128, 0.1, 30.0
LEARNING_RATE, BETAS, EMA_POWER = 1e-3, (0.9, 0.95), 8.0


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the network and of the batch."""

    heads: int = 4
    head_dim: int = 64
    double: int = 2
    single: int = 4
    modes: int = 16
    rank: int = 16
    batch: int = 4
    rows: int = 16  # of image tokens; as many columns
    text: int = 64

    @property
    def flux(self) -> dict[str, Any]:
        return {
            "in_channels": 64,
            "num_layers": self.double,
            "num_single_layers": self.single,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": 128,
            "pooled_projection_dim": 64,
            "guidance_embeds": True,
            "axes_dims_rope": (self.head_dim // 4, 3 * self.head_dim // 8, 3 * self.head_dim // 8),
        }


# Ours


def ours(size: Size, decay: int, steps: int, folder: Path) -> Iterator[float]:
    """Yields the loss of each training step; before the first, writes weights and random numbers to `folder`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from arcflow_jax.convert.adapter import AdapterTable
    from arcflow_jax.convert.backbones import flux as table
    from arcflow_jax.convert.engine import export_tensors
    from arcflow_jax.families.flux import FAMILY, FLUX
    from arcflow_jax.families.latents import position_ids
    from arcflow_jax.flow.distill import Distillation, Draws
    from arcflow_jax.networks.backbones.flux import FluxConditioning, FluxConfig
    from arcflow_jax.networks.student import AdapterConfig, split_model
    from arcflow_jax.parallel.mesh import make_mesh, state_shardings
    from arcflow_jax.training.optimizer import OptimizerConfig, make_optimizer
    from arcflow_jax.training.state import EmaConfig, TrainState, train_step

    lengths = {"nfe": NFE, "shift": SHIFT, "states": STATES, "window": WINDOW, "substeps": SUBSTEPS}
    settings = Distillation(**lengths, mode_dropout=MODE_DROPOUT, decay=decay, loss_scale=LOSS_SCALE)
    config, tokens = FluxConfig(**size.flux), size.rows**2
    key = jax.random.key(0)
    model = FLUX.build(config, jnp.float32, nnx.Rngs(1))
    model.attach_student(AdapterConfig(size.modes, size.rank, float(size.rank), 0.0, FAMILY.lora_targets), nnx.Rngs(0))
    model.initialize_student(key)
    graphdef, base, adapter = split_model(model)
    adapter = jax.tree.map(jnp.copy, adapter)  # the head shares arrays with the base model, and is donated

    rng = np.random.default_rng(0)
    conditioning = FluxConditioning(
        text=jnp.asarray(rng.standard_normal((size.batch, size.text, config.joint_attention_dim)), jnp.float32),
        pooled=jnp.asarray(rng.standard_normal((size.batch, config.pooled_projection_dim)), jnp.float32),
        guidance=jnp.full(size.batch, 3.5),
        positions=position_ids(size.rows, size.rows),
    )
    numbers = {name: np.asarray(getattr(conditioning, name)) for name in ("text", "pooled", "guidance", "positions")}
    for i in range(steps):  # as train_step and distil draw them
        noise_key, loss_key = jax.random.split(jax.random.fold_in(key, i))
        numbers[f"{i}.noise"] = np.asarray(jax.random.normal(noise_key, (size.batch, tokens, config.in_channels)))
        for j in range(NFE):
            draw_key, _ = jax.random.split(jax.random.fold_in(loss_key, j))
            draws = Draws.draw(draw_key, size.batch, size.modes, STATES)
            numbers |= {f"{i}.{j}.{name}": np.asarray(u) for name, u in dataclasses.asdict(draws).items()}
    save_file(export_tensors(table, base), folder / "base.safetensors")
    save_file(export_tensors(AdapterTable(table), adapter), folder / "adapter.safetensors")
    save_file(numbers, folder / "numbers.safetensors")

    optimizer_config = OptimizerConfig(LEARNING_RATE, 0, 0, *BETAS, 0.0, 50.0, 0, ())
    optimizer = make_optimizer(optimizer_config, adapter)
    step = functools.partial(
        train_step.lower,
        graphdef=graphdef,
        settings=settings,
        guidance=3.5,
        optimizer=optimizer_config,
        ema=EmaConfig(0, EMA_POWER),
        steady=decay == 0,
        mesh=(mesh := make_mesh((1, 1, 1, 1), jax.devices()[:1])),
    )
    state = TrainState.create(adapter, optimizer)
    state = jax.device_put(state, state_shardings(mesh, state))  # sharded as a step leaves it
    del model, adapter
    with jax.set_mesh(mesh):
        program = step(state, base, conditioning, key).compile()
        for _ in range(steps):
            state, log = program(state, base, conditioning, key)
            yield float(jax.block_until_ready((state, log))[1]["loss"])


# The same in PyTorch


def theirs(size: Size, decay: int, steps: int, folder: Path) -> Iterator[float]:
    """Yields the loss of each training step, from what `ours` wrote to `folder`."""
    import peft
    import torch
    from diffusers import FluxTransformer2DModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor, nn

    numbers = {name: torch.from_numpy(array) for name, array in load_file(folder / "numbers.safetensors").items()}
    trained = {name: torch.from_numpy(array) for name, array in load_file(folder / "adapter.safetensors").items()}

    class Passing(nn.Module):
        """Replaces the output norm: returns the hidden state unchanged, and keeps the time embedding."""

        def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
            self.temb = temb
            return hidden

    class Head(nn.Module):
        def __init__(self, norm: nn.Module, width: int):
            super().__init__()
            self.norm_out = norm
            self.proj_out_means = nn.Linear(width, size.modes * 64)
            self.proj_out_logweights = nn.Linear(width, size.modes * 4)
            self.proj_out_loggamma = nn.Linear(width, (size.modes - 1) * 4)

        def forward(self, hidden: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.norm_out(hidden, temb)
            b, n, _ = y.shape
            momenta = self.proj_out_loggamma(y).reshape(b, n, size.modes - 1, 4)
            return (
                self.proj_out_means(y).reshape(b, n, size.modes, 16, 4),
                self.proj_out_logweights(y).reshape(b, n, size.modes, 4),
                torch.cat([torch.zeros_like(momenta[:, :, :1]), momenta], 2),
            )

    backbone = FluxTransformer2DModel(**size.flux)
    backbone.load_state_dict({name: torch.from_numpy(a) for name, a in load_file(folder / "base.safetensors").items()})
    backbone.requires_grad_(False)
    backbone.enable_gradient_checkpointing()
    head = Head(copy.deepcopy(backbone.norm_out), backbone.inner_dim).requires_grad_(True)
    output_norm, output = backbone.norm_out, backbone.proj_out
    backbone.norm_out, backbone.proj_out = Passing(), nn.Identity()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=size.rank, lora_alpha=size.rank, target_modules=THEIR_TARGETS, lora_dropout=0.0), backbone
    )
    loras = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
    lora_parameters = {n.replace(".default", ""): p for n, p in backbone.named_parameters() if "lora_" in n}
    parameters = lora_parameters | dict(head.named_parameters())
    assert parameters.keys() == trained.keys(), parameters.keys() ^ trained.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(list(parameters.values()), LEARNING_RATE, betas=BETAS, weight_decay=0.0)

    def sigma_of(t: Tensor) -> Tensor:
        return SHIFT * t / (1 + (SHIFT - 1) * t)

    def hidden(x: Tensor, sigma: Tensor, adapters: bool) -> tuple[Tensor, Tensor]:
        for layer in loras:
            layer.enable_adapters(adapters)
        times = len(x) // size.batch
        text, pooled, guidance = (numbers[name].repeat_interleave(times, 0) for name in ("text", "pooled", "guidance"))
        out = backbone(
            hidden_states=x,
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            img_ids=numbers["positions"],
            txt_ids=torch.zeros(size.text, 3),
        ).sample
        return out, backbone.norm_out.temb

    @torch.no_grad()
    def teacher(x: Tensor, sigma: Tensor) -> Tensor:
        return output(output_norm(*hidden(x, sigma, adapters=False)))

    def phi(z: Tensor) -> Tensor:
        near = z.abs() < 1e-3
        safe = torch.where(near, 1.0, z)
        return torch.where(near, 1 + z / 2 + z * z / 6, torch.expm1(safe) / safe)

    def mean_velocity(mixture: tuple[Tensor, Tensor, Tensor], src: Tensor, a: Tensor, b: Tensor) -> Tensor:
        means, logits, g = mixture
        src, a, b = (s[:, None, None, None] for s in (src, a, b))
        weights = logits.softmax(2) * torch.exp(g * (src - a)) * phi(g * (a - b))
        return (weights[:, :, :, None] * means).sum(2).flatten(2)

    def displacement(mixture: tuple[Tensor, Tensor, Tensor], src: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (a - b)[:, None, None] * mean_velocity(mixture, src, a, b)

    def segment(x: Tensor, i: int, j: int, share: float) -> tuple[Tensor, Tensor]:
        """The loss of segment j in training step i, and the state in which the next segment starts."""
        length = torch.full((size.batch,), 1 / NFE)
        start = 1 - j * length
        src = sigma_of(start)
        mixture = head(*hidden(x, src, adapters=True))
        substep = length / (length * SUBSTEPS).round().clamp(min=1)
        window = torch.minimum(WINDOW * substep, length)
        modes, student, turns = (numbers[f"{i}.{j}.{name}"] for name in ("modes", "student", "teacher"))
        turns = torch.cat([torch.zeros(size.batch, 1), turns.sort(-1).values, torch.ones(size.batch, 1)], 1)
        student = student.sort(-1).values

        def times(turns: Tensor) -> Tensor:
            travelled = (length - window)[:, None] * ((1 - share) * student + share * turns)
            return (start[:, None] - travelled).clamp(min=0).T

        arrive, leave = times(turns[:, :-1]), times(turns[:, 1:])  # [M, B]
        dropped = modes < MODE_DROPOUT
        dropped &= ~dropped.all(-1, keepdim=True)
        means, logits, g = (part.detach() for part in mixture)
        rollout = means, logits.masked_fill(dropped[:, None, :, None], -math.inf), g
        with torch.no_grad():
            if share == 0:
                states = torch.stack([x - displacement(rollout, src, src, sigma_of(t)) for t in arrive])
                together = teacher(states.transpose(0, 1).flatten(0, 1), sigma_of(arrive).T.flatten())
                targets = together.unflatten(0, (size.batch, STATES)).transpose(0, 1)
                sigma = src
            else:
                sigma, targets = src, []
                for a, b in zip(sigma_of(arrive), sigma_of(leave), strict=True):
                    x = x - displacement(rollout, src, sigma, a)
                    targets.append(teacher(x, a))
                    x, sigma = x + targets[-1] * (b - a)[:, None, None], b
            end = x - displacement(rollout, src, sigma, sigma_of(start - length))
        error = 0.0
        for t_a, t_b, target in zip(arrive, leave - window, targets, strict=True):
            a = sigma_of(t_a)
            b = torch.where(((t_a - t_b) * SUBSTEPS).round() < 2, a, sigma_of(t_b))
            error = error + (mean_velocity(mixture, src, a, b) - target).square().mean() / STATES
        return LOSS_SCALE * 0.5 * error, end

    for i in range(steps):
        share = max(1 - i / decay, 0.0) if decay else 0.0
        x, total = numbers[f"{i}.noise"], 0.0
        for j in range(NFE):
            loss, x = segment(x, i, j, share)
            for layer in loras:  # the backward pass recomputes the blocks
                layer.enable_adapters(True)
            (loss / NFE).backward()
            total += loss.item() / NFE
        torch.nn.utils.clip_grad_norm_(parameters.values(), 50.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                average[name].lerp_(parameter, 1 - (1 - 1 / (i + 1)) ** EMA_POWER)
        yield total


# Taking turns

SIDES: dict[str, Callable[[Size, int, int, Path], Iterator[float]]] = {"ours": ours, "theirs": theirs}


def memory(what: str) -> int:
    """Resident bytes of this process: "VmRSS" now, "VmHWM" at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def work(side: str, size: Size, decay: int, steps: int, folder: Path) -> None:
    """Runs a training step for each line on stdin, and prints seconds, loss and peak memory so far, as JSON."""
    if side == "ours":
        import jax

        import arcflow_jax.training.state  # noqa: F401
    else:
        import diffusers.models.transformers.transformer_flux  # noqa: F401
        import peft  # noqa: F401
    before = memory("VmRSS")
    losses, warm = SIDES[side](size, decay, steps, folder), False
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = next(losses)
        print(json.dumps([time.perf_counter() - start, loss, memory("VmHWM") - before]), flush=True)
        if not warm:  # returns the memory of compiler and set-up, which the step does not use
            if side == "ours":
                jax.clear_caches()  # programs that built the model, operation by operation; a run loads its model
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            warm = True


def compare(size: Size, decay: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and peak bytes of each side. Raises SystemExit if their losses differ."""
    steps = rounds + 1  # the first compiles and warms up
    answers: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        request = json.dumps({"size": dataclasses.asdict(size), "decay": decay, "steps": steps, "folder": folder})
        workers = {
            side: subprocess.Popen(
                [sys.executable, __file__, "--work", side, request],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for side in SIDES
        }
        for _ in range(steps):
            for side, worker in workers.items():
                worker.stdin.write("\n")
                worker.stdin.flush()
                answers[side].append(json.loads(worker.stdout.readline()))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    mine, other = (np.array([loss for _, loss, _ in answers[side]]) for side in SIDES)
    if not np.allclose(mine, other, rtol=2e-3):
        raise SystemExit(f"the losses differ: ours {mine}, PyTorch's {other}")
    print(f"  losses agree within {np.abs(mine / other - 1).max():.1e}")
    return {
        side: {"seconds": statistics.median(t for t, *_ in steps[1:]), "bytes": steps[-1][2]}
        for side, steps in answers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)  # the processes that `compare` starts
    arguments = parser.parse_args()
    if arguments.work:
        side, request = arguments.work[0], json.loads(arguments.work[1])
        work(side, Size(**request["size"]), request["decay"], request["steps"], Path(request["folder"]))
        return
    size = Size(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Size)})
    print(size)
    for phase, decay in (("mixed", 2 * arguments.rounds), ("steady", 0)):
        print(phase)
        found = compare(size, decay, arguments.rounds)
        for what, scale, unit in (("seconds", 1, "s"), ("bytes", 2**-20, "MiB")):
            mine, other = (found[side][what] * scale for side in SIDES)
            print(f"  ours {mine:9.3f} {unit:3}   PyTorch {other:9.3f} {unit:3}   PyTorch / ours {other / mine:.2f}")


if __name__ == "__main__":
    main()
