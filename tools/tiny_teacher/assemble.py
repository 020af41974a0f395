"""Puts the trained parts together as a diffusers FLUX folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from arcflow_jax.convert import flux as flux_table
from arcflow_jax.convert import vae_kl as autoencoder_table
from arcflow_jax.convert.engine import export_tensors
from arcflow_jax.demo import world as pictures
from arcflow_jax.networks.vae_kl import AutoencoderKL
from tools.tiny_teacher import autoencoder, common, denoiser

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
# Latents this small want no time shift: FLUX's own shift shrinks with the number of image tokens
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.35.1",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}


def write_component(folder: Path, config: dict[str, Any], table: Any, state: nnx.State, dtype: Any) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: np.ascontiguousarray(array.astype(dtype)) for name, array in export_tensors(table, state).items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


HELD_OUT = 0.3  # of the captions: kept from distillation, and what the demo measures with
TRAIN_PROMPTS, TEST_PROMPTS = 2048, 512


def write_prompts(work: Path) -> None:
    """Prompts as random pictures have them: captions that leave much open come more than once."""
    captions = pictures.all_captions()
    order = np.random.default_rng(0).permutation(len(captions))
    held_out = np.zeros(len(captions), bool)
    held_out[order[: int(HELD_OUT * len(captions))]] = True
    for name, count, seed in (("train", TRAIN_PROMPTS, 1), ("test", TEST_PROMPTS, 2)):
        # Draws far more than are needed, and keeps the first of this side of the division
        drawn = np.asarray(denoiser.caption_index(pictures.random_attributes(jax.random.key(seed), 20 * count)))
        lines = [str(captions[i]) for i in drawn if held_out[i] == (name == "test")][:count]
        (work / f"prompts-{name}.txt").write_text("\n".join(lines) + "\n")


def assemble(work: Path) -> None:
    """Writes `work`/tiny-flux: transformer and autoencoder in bfloat16, text encoders as they are."""
    write_prompts(work)
    out = work / "tiny-flux"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(work / "text", out)
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")

    model = common.load_state(work / "guided.safetensors", denoiser.new_model())
    config = {"_class_name": "FluxTransformer2DModel", "patch_size": 1, **dataclasses.asdict(denoiser.CONFIG)}
    write_component(out / "transformer", config, flux_table, nnx.state(model), ml_dtypes.bfloat16)

    latents = load_file(work / "latents.safetensors")
    geometry = dataclasses.replace(
        autoencoder.CONFIG, shift_factor=float(latents["shift"]), scaling_factor=float(latents["scale"])
    )
    vae = common.load_state(work / "autoencoder.safetensors", AutoencoderKL(geometry, rngs=nnx.Rngs(0)))
    levels = len(geometry.block_out_channels)
    config = {
        "_class_name": "AutoencoderKL",
        **dataclasses.asdict(geometry),
        "act_fn": "silu",
        "sample_size": denoiser.GRID * 2 * geometry.factor,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": False,
    }
    write_component(out / "vae", config, autoencoder_table, nnx.state(vae), ml_dtypes.bfloat16)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")
