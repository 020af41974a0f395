"""A complete, tiny diffusers FLUX folder with random weights, written without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from arcflow_jax import families, schema
from arcflow_jax.convert.engine import export_tensors

CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
        "axes_dims_rope": [2, 2, 4],
    },
    "text_encoder": {
        "vocab_size": 20,
        "hidden_size": 10,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "text_encoder_2": {"vocab_size": 20, "d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2},
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [4, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    },
}
NETWORKS = families.of_pipeline("FluxPipeline", "FluxPipeline").networks


def random_state(component: str) -> nnx.State:
    """Random weights of a component, float32."""
    network = NETWORKS[component]
    abstract = nnx.state(network.abstract(schema.parse(network.config, CONFIGS[component], component)))
    rng = np.random.default_rng(len(component))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), abstract)


def weights_file(folder: Path, component: str) -> Path:
    stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
    return folder / component / f"{stem}.safetensors"


def write_source(folder: Path, dtype: Any = np.float32) -> dict[str, dict[str, np.ndarray]]:
    """Writes the folder, T5 in two shards, and returns each component's tensors."""
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "image_encoder": [None, None]}
    written = {}
    for component, config in CONFIGS.items():
        index[component] = ["library", NETWORKS[component].class_name]
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(config))
        tensors = export_tensors(NETWORKS[component].table, random_state(component))
        written[component] = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        if component == "text_encoder_2":
            write_shards(folder / component, written[component])
        else:
            save_file(written[component], weights_file(folder, component))
    for name in ("tokenizer", "tokenizer_2"):
        index[name] = ["transformers", "AnyTokenizer"]
        (folder / name).mkdir()
        (folder / name / "tokenizer_config.json").write_text("{}")
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    (folder / "model_index.json").write_text(json.dumps(index))
    return written


def write_shards(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Two shards and their index, as transformers writes them."""
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
