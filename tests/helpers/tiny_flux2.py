"""A complete, tiny FLUX.2 [klein] folder with random weights, written without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from arcflow_jax import schema
from arcflow_jax.convert.engine import export_tensors
from arcflow_jax.demo import ASSETS
from arcflow_jax.families.flux2 import FAMILY
from arcflow_jax.networks.text.qwen3 import READ
from arcflow_jax.storage.files import read_json
from tools.tiny_teacher.flux2 import CHAT_TEMPLATE

LENGTH = 56  # tokens of a prompt in its template
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "Flux2Transformer2DModel",
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 6,  # in three groups
        "joint_attention_dim": 48,
        "guidance_embeds": False,
        "axes_dims_rope": [2, 2, 2, 2],
    },
    "text_encoder": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": READ[-1] + 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "vae": {
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 16,
    },
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_shift": 0.5,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def tensors_of(component: str, config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random weights of a component, with the names of its checkpoint."""
    network = FAMILY.networks[component]
    made = network.build(schema.parse(network.config, config, component), np.float32, nnx.Rngs(seed))
    tensors = export_tensors(network.table, nnx.state(made))
    if component == "vae":
        rng = np.random.default_rng(seed)
        tensors["bn.running_mean"] = rng.normal(size=16).astype(np.float32)
        tensors["bn.running_var"] = rng.uniform(0.3, 3, 16).astype(np.float32)
        tensors["bn.num_batches_tracked"] = np.array(7)
    if component == "text_encoder":  # what comes after the layers that are read
        first = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.0.")}
        tensors |= {name.replace(".0.", f".{READ[-1]}.", 1): tensor for name, tensor in first.items()}
        tensors["model.norm.weight"] = np.ones(config["hidden_size"], np.float32)
    return tensors


def make_tiny_flux2(out: Path) -> Path:
    """Writes the folder `out`, which must not exist yet, and returns it."""
    shutil.copytree(ASSETS / "tiny-qwen" / "tokenizer", out / "tokenizer")
    file = out / "tokenizer" / "tokenizer_config.json"
    tokenizer = read_json(file) | {"model_max_length": LENGTH, "chat_template": CHAT_TEMPLATE}
    file.write_text(json.dumps(tokenizer))
    vocabulary = max(map(int, tokenizer["added_tokens_decoder"])) + 1
    index: dict[str, Any] = {
        "_class_name": FAMILY.pipeline,
        "is_distilled": False,
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    }
    for seed, (component, config) in enumerate(CONFIGS.items()):
        text = component == "text_encoder"
        config = config | ({"vocab_size": vocabulary} if text else {})
        index[component] = ["transformers" if text else "diffusers", FAMILY.networks[component].class_name]
        (out / component).mkdir()
        (out / component / "config.json").write_text(json.dumps(config))
        stem = "model" if text else "diffusion_pytorch_model"
        save_file(tensors_of(component, config, seed), out / component / f"{stem}.safetensors", {"format": "pt"})
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (out / "model_index.json").write_text(json.dumps(index))
    return out
