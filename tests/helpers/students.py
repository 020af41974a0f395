"""Students to import, export and sample: the authors' own, and random ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from arcflow_jax.checkpoints.training import AdapterDescription, Checkpoints
from arcflow_jax.flow.curve import Curve
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.student import AdapterConfig, ArcModel, split_model
from arcflow_jax.training.loop import describe
from arcflow_jax.training.state import Skipped, TrainState
from tests.helpers.command_line import run
from tests.helpers.golden import LORA
from tests.helpers.paths import GOLDEN

RELEASED = GOLDEN / "arcflux_tiny_adapter"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def random_student(directory: ModelDirectory, adapter: AdapterConfig, seed: int) -> nnx.State:
    _, _, abstract = split_model(directory.student(adapter, jnp.float32))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), abstract)


def write_run(
    path: Path,
    base: Path,
    adapter: AdapterConfig = LORA,
    settings: Distillation = Distillation(),  # noqa: B008
    guidance: float = 3.5,
    changed: Callable[[nnx.State], nnx.State] = lambda state: state,
) -> tuple[nnx.State, nnx.State]:
    """Writes a training run with random weights; `changed` may change its EMA weights. Returns raw and EMA weights."""
    directory = ModelDirectory.open(base)
    transformer = directory.description.components["transformer"]
    pipeline = directory.family.pipeline
    describe(path, AdapterDescription(directory.fingerprint, adapter, settings, guidance, transformer, pipeline))
    raw, ema = random_student(directory, adapter, 1), changed(random_student(directory, adapter, 2))
    with Checkpoints(path) as checkpoints:
        state = TrainState(jnp.int32(7), raw, ema, (jnp.zeros(3),), Skipped(jnp.int32(0), jnp.int32(0)))
        checkpoints.save(7, state.items())
    return raw, ema


def convert(capfd, source: Path, base: Path, out: Path, *options: object) -> Path:
    code, stdout, stderr = run(capfd, "convert", "--adapter", source, "--base", base, "--out", out, *options)
    assert (code, stdout, stderr) == (0, f"converted {source} to {out}\n", "")
    return out


def export(capfd, adapter: Path, out: Path, *options: object) -> Path:
    code, stdout, stderr = run(capfd, "export", "--adapter", adapter, "--out", out, *options)
    assert (code, stdout, stderr) == (0, f"exported {adapter} to {out}\n", "")
    return out


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, "np") as file:
        return file.metadata()


def student(base: Path, adapter: Path) -> ArcModel:
    """As the pipeline puts it together, but not merged."""
    directory = ModelDirectory.open(base)
    description = AdapterDescription.read(adapter)
    graphdef, frozen, trained = split_model(directory.student(description.adapter, jnp.float32))
    with Checkpoints(adapter) as checkpoints:
        return nnx.merge(graphdef, directory.load("transformer", frozen), checkpoints.restore_adapter(trained))


def attach_student(twin, folder: Path) -> None:
    """Makes a teacher of diffusers' the student in a folder, which gives all its numbers in place of a velocity."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file as load_torch

    tensors = load_torch(folder / WEIGHTS)
    # The three projections as one, in the place of the teacher's
    weight, bias = (
        torch.cat([tensors[f"proj_out_{name}.{kind}"] for name in ("means", "logweights", "loggamma")])
        for kind in ("weight", "bias")
    )
    twin.proj_out = torch.nn.Linear(*reversed(weight.shape))
    twin.proj_out.load_state_dict({"weight": weight, "bias": bias})
    norm = {kind: tensors[f"norm_out.linear.{kind}"] for kind in ("weight", "bias")}
    twin.norm_out.linear = torch.nn.Linear(*reversed(norm["weight"].shape))  # FLUX.2's has no bias
    twin.norm_out.linear.load_state_dict(norm)
    lora = {name: tensor for name, tensor in tensors.items() if "lora" in name}
    twin.load_lora_adapter(dict(lora), prefix=None, adapter_name="student")
    loaded = get_peft_model_state_dict(twin, adapter_name="student")
    assert loaded.keys() == lora.keys()
    assert all(torch.equal(loaded[name], lora[name]) for name in lora)


@nnx.jit
def curve(model: ArcModel, tokens, sigma, conditioning, dropout_key: jax.Array | None = None) -> Curve:
    """A student's curve. Outside jit, every operation of a network would be compiled on its own."""
    return model.student_curve(tokens, sigma, conditioning, dropout_key)


def predicted(model: ArcModel, tokens, sigma, conditioning) -> np.ndarray:
    """All numbers of a student's mixture, [B, N, ...], in the order of `attach_student`."""
    mixture = jax.tree.leaves(curve(model, tokens, sigma, conditioning))
    return np.concatenate([np.reshape(part, (*tokens.shape[:2], -1)) for part in mixture], axis=-1)
