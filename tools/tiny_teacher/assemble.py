"""Assembles the trained parts into a diffusers FLUX folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from arcflow_jax import families
from arcflow_jax.convert.backbones import flux as flux_table
from arcflow_jax.convert.engine import export_tensors
from arcflow_jax.convert.vaes import kl as vae_table
from arcflow_jax.demo.captions import Captions
from arcflow_jax.networks.vaes.kl import AutoencoderKL
from arcflow_jax.storage.files import write_json
from tools.tiny_teacher import common, denoiser
from tools.tiny_teacher.teacher import Teacher

MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.35.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# Latents this small need no timestep shift: FLUX's own shift shrinks with the number of image tokens
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.35.1",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}


def write_component(folder: Path, config: dict[str, Any], table: Any, state: nnx.State, dtype: Any) -> None:
    tensors = {name: np.ascontiguousarray(array.astype(dtype)) for name, array in export_tensors(table, state).items()}
    write_tensors(folder, config, tensors)


def write_tensors(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


HELD_OUT = 0.3  # share of the captions that distillation never sees, and that the demo is measured on
TRAIN_PROMPTS, TEST_PROMPTS = 2048, 512


def write_prompts(work: Path, captions: Captions[Any]) -> None:
    """Writes prompts as often as random images have them, so captions that omit much appear more than once."""
    every = captions.all()
    order = np.random.default_rng(0).permutation(len(every))
    held_out = np.zeros(len(every), bool)
    held_out[order[: int(HELD_OUT * len(every))]] = True
    for name, count, seed in (("train", TRAIN_PROMPTS, 1), ("test", TEST_PROMPTS, 2)):
        # Draws far more than needed, and keeps the first ones of this part
        drawn = np.asarray(captions.index(captions.random(jax.random.key(seed), 20 * count)))
        lines = [str(every[i]) for i in drawn if held_out[i] == (name == "test")][:count]
        (work / f"prompts-{name}.txt").write_text("\n".join(lines) + "\n")


def start_folder(work: Path, captions: Captions[Any], name: str, pipeline: str, tokenizer: str) -> Path:
    """Writes `work`/`name` with text encoder, scheduler and index, for a family with one text encoder; returns it."""
    write_prompts(work, captions)
    out = work / name
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(work / "text", out)
    index = {"_class_name": pipeline, "scheduler": ["diffusers", SCHEDULER["_class_name"]]}
    index["tokenizer"] = ["transformers", tokenizer]
    family = families.of_pipeline(pipeline, pipeline)
    for component, network in family.networks.items():
        index[component] = ["transformers" if component == "text_encoder" else "diffusers", network.class_name]
    write_json(out / "model_index.json", index | family.settings)
    (out / "scheduler").mkdir()
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    return out


def print_size(out: Path) -> None:
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


def assemble(work: Path, teacher: Teacher) -> None:
    """Writes the folder: transformer and VAE in bfloat16."""
    write_prompts(work, teacher.captions)
    out = work / teacher.name
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(work / "text", out)
    write_json(out / "model_index.json", MODEL_INDEX)
    (out / "scheduler").mkdir()
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)

    model = common.load_state(work / "guided.safetensors", denoiser.new_model(teacher))
    config = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, **dataclasses.asdict(teacher.transformer)}
    write_component(out / "transformer", config, flux_table, nnx.state(model), ml_dtypes.bfloat16)

    latents = load_file(work / "latents.safetensors")
    vae_config = dataclasses.replace(
        teacher.vae, shift_factor=float(latents["shift"]), scaling_factor=float(latents["scale"])
    )
    vae = common.load_state(work / "vae.safetensors", AutoencoderKL(vae_config, rngs=nnx.Rngs(0)))
    levels = len(vae_config.block_out_channels)
    config = {
        "_class_name": "AutoencoderKL",
        **dataclasses.asdict(vae_config),
        "act_fn": "silu",
        "sample_size": denoiser.GRID * 2 * vae_config.factor,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": False,
    }
    write_component(out / "vae", config, vae_table, nnx.state(vae), ml_dtypes.bfloat16)
    print_size(out)
