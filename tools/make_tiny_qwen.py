"""Writes a tiny Qwen-Image with random weights as a diffusers folder, to try every command on.

    python tools/make_tiny_qwen.py --out /tmp/tiny-qwen
    arcflow convert --source /tmp/tiny-qwen --out /tmp/tiny-qwen-converted

Its images show nothing. The tokenizer is byte-level BPE like Qwen2's, trained on the bundled prompts and the
pipeline's template. Each word of the template is one token, as in Qwen2's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax.numpy as jnp
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from arcflow_jax import families, schema
from arcflow_jax.convert.engine import export_tensors
from arcflow_jax.demo import ASSETS
from arcflow_jax.families.qwen_image import QwenPrompts
from arcflow_jax.storage.files import write_json

PIPELINE = "QwenImagePipeline"
LENGTH = QwenPrompts.BEFORE + 30  # tokens; the longest bundled prompt has 11 words, and 5 tokens follow it
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "guidance_embeds": False,
        "axes_dims_rope": [4, 6, 6],
    },
    "text_encoder": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "use_sliding_window": False,
        },
        # There is no vision tower, and nothing reads one; transformers needs its sizes to build one
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    },
    "vae": {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": [-0.8, 0.1, 1.6, -0.3],
        "latents_std": [2.8, 1.4, 1.1, 1.9],
        "sample_size": 64,
    },
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}


def make_tokenizer(
    folder: Path,
    template: str = QwenPrompts.TEMPLATE,
    length: int = LENGTH,
    special: Sequence[str] = SPECIAL,
    **config: Any,
) -> int:
    """Writes a tokenizer, with more in its `config`, and returns the size of its vocabulary."""
    texts = [template, *(ASSETS / "shapes" / "prompts-train.txt").read_text().splitlines()]
    # Each word also as the first of a prompt, without a space before it
    texts += [word for text in texts for word in text.split()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((part for text in texts for part in split_special(text, special)), trainer)
    trained = json.loads(tokenizer.to_str())["model"]

    folder.mkdir(parents=True)
    vocabulary = trained["vocab"]
    merges = [tuple(pair) for pair in trained["merges"]]
    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": list(special)}
    whole = Qwen2Tokenizer(vocab=vocabulary, merges=merges, **options)
    whole.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": length,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "added_tokens_decoder": {
                str(whole.convert_tokens_to_ids(token)): {"content": token, "special": True} for token in special
            },
            **config,
        },
    )
    return len(whole)


def split_special(text: str, special: Sequence[str]) -> list[str]:
    """The parts of a text between special tokens."""
    for token in special:
        text = text.replace(token, "\0")
    return text.split("\0")


def make_tiny_qwen(out: Path, seed: int = 0) -> Path:
    """Writes the folder `out`, which must not exist yet, and returns it."""
    text = CONFIGS["text_encoder"]
    vocabulary = {"vocab_size": make_tokenizer(out / "tokenizer")}
    configs = CONFIGS | {"text_encoder": text | {"text_config": text["text_config"] | vocabulary}}
    index: dict[str, Any] = {
        "_class_name": PIPELINE,
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
    }
    for i, (component, config) in enumerate(configs.items()):
        network = families.of_pipeline(PIPELINE, PIPELINE).networks[component]
        library, stem = (
            ("transformers", "model") if "encoder" in component else ("diffusers", "diffusion_pytorch_model")
        )
        index[component] = [library, network.class_name]
        (out / component).mkdir()
        write_json(out / component / "config.json", config)
        made = network.build(schema.parse(network.config, config, component), jnp.float32, nnx.Rngs(3 * seed + i))
        tensors = export_tensors(network.table, nnx.state(made))
        save_file(tensors, out / component / f"{stem}.safetensors", metadata={"format": "pt"})
    (out / "scheduler").mkdir()
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", index)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = parser.parse_args()
    print(make_tiny_qwen(args.out, args.seed))


if __name__ == "__main__":
    main()
