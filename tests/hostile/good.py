"""The inputs that are damaged: tiny models of random weights and all that is made of them, once per process."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from arcflow_jax import families, schema
from arcflow_jax.checkpoints.student_formats import export_adapter
from arcflow_jax.convert.engine import export_tensors, import_tensors
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.student import AdapterConfig
from arcflow_jax.storage.files import parse_json, seal
from tests.helpers import source_folder, students, tiny_flux2

QWEN: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "guidance_embeds": False,
        "axes_dims_rope": [2, 2, 4],
    },
    "text_encoder": {
        "vocab_size": 445,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    },
    "vae": {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [True],
        "latents_mean": [0.1, 0.2, 0.3, 0.4],
        "latents_std": [0.7, 0.8, 0.9, 1.0],
        "sample_size": 16,
    },
}
FLUX = {
    **source_folder.CONFIGS,
    "text_encoder": source_folder.CONFIGS["text_encoder"]
    | {"vocab_size": 597, "eos_token_id": 596, "max_position_embeddings": 32},
    "text_encoder_2": source_folder.CONFIGS["text_encoder_2"] | {"vocab_size": 123},
    "vae": source_folder.CONFIGS["vae"] | {"sample_size": 16},
}
FLUX2 = {**tiny_flux2.CONFIGS, "text_encoder": tiny_flux2.CONFIGS["text_encoder"] | {"vocab_size": 445}}
PIPELINES = {
    "flux": ("FluxPipeline", FLUX),
    "qwen": ("QwenImagePipeline", QWEN),
    "flux2": ("Flux2KleinPipeline", FLUX2),
}
KINDS = tuple(PIPELINES)
# FLUX.2's tensors that are not used: how many batches a statistic is of, and what comes after the layers that are read
UNUSED = re.compile(r"bn\.num_batches_tracked|model\.norm\.weight|model\.layers\.27\..*")
ADAPTER = {
    "flux": AdapterConfig(modes=3, rank=2, alpha=2.0, dropout=0.0, targets=("single_transformer_blocks.proj_out",)),
    "qwen": AdapterConfig(modes=3, rank=2, alpha=2.0, dropout=0.0, targets=("transformer_blocks.img_mlp.*",)),
    "flux2": AdapterConfig(modes=3, rank=2, alpha=2.0, dropout=0.0, targets=("transformer_blocks.ff.*",)),
}
PROMPTS = ["a red fox", "a blue house in the snow", "zwei Füchse – 狐", "an old man"]


@functools.cache
def root() -> Path:
    """A folder of this process, removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    pid = os.getpid()
    atexit.register(lambda: os.getpid() == pid and shutil.rmtree(folder, ignore_errors=True))
    return folder


def copy(source: Path, target: Path) -> Path:
    """A copy of hard links: replace a file in it, do not write into it."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def put(path: Path, data: bytes) -> None:
    """Replaces a file in a copy."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def put_own(rng: random.Random, path: Path, text: bytes) -> bool:
    """Replaces a JSON file of ours, most times with the SHA-256 of what it says now. Returns whether it is."""
    try:
        values = parse_json(text, path)
        old = values.pop("sha256", None)
    except UserError:
        old = None
    fits = isinstance(old, str) and len(old) == 64 and rng.random() < 0.8
    put(path, text.replace(old.encode(), seal(values).encode()) if fits else text)
    return fits


def networks(kind: str) -> Any:
    pipeline, _ = PIPELINES[kind]
    return families.of_pipeline(pipeline, kind).networks


@functools.cache
def source(kind: str) -> Path:
    """A diffusers folder, its text encoder in shards, with the tokenizers of the bundled teacher."""
    pipeline, configs = PIPELINES[kind]
    folder = root() / f"{kind}-source"
    if kind == "flux2":
        return with_shards(tiny_flux2.make_tiny_flux2(folder))
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.35.1"}
    for component, config in configs.items():
        network = networks(kind)[component]
        index[component] = ["library", network.class_name]
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(config))
        abstract = nnx.state(network.abstract(schema.parse(network.config, config, component)))
        rng = np.random.default_rng(len(component))
        state = jax.tree.map(lambda x, rng=rng: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), abstract)
        tensors = export_tensors(network.table, state)
        if component == "text_encoder":
            source_folder.write_shards(folder / component, tensors)
        else:
            save_file(tensors, source_folder.weights_file(folder, component))
    bundled = ASSETS / f"tiny-{kind}"
    for tokenizer in bundled.glob("tokenizer*"):
        shutil.copytree(tokenizer, folder / tokenizer.name)
        index[tokenizer.name] = ["transformers", "AnyTokenizer"]
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    shutil.copytree(bundled / "scheduler", folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def with_shards(source: Path) -> Path:
    """A folder with its text encoder in shards."""
    file = source / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    source_folder.write_shards(file.parent, tensors)
    return source


@functools.cache
def original() -> Path:
    """FLUX.2's transformer in the single file of its authors."""
    network = networks("flux2")["transformer"]
    config = schema.parse(network.config, PIPELINES["flux2"][1]["transformer"], "transformer")
    tensors = load_file(source_folder.weights_file(source("flux2"), "transformer"))
    state = import_tensors(network.table, tensors, nnx.state(network.abstract(config)))
    file = root() / "original" / "flux-2.safetensors"
    file.parent.mkdir()
    save_file(export_tensors(network.original(config), state), file)
    return file


@functools.cache
def model(kind: str) -> Path:
    """The converted model."""
    return convert_model(source(kind), root() / f"{kind}-model")


@functools.cache
def directory(kind: str) -> ModelDirectory:
    return ModelDirectory.open(model(kind))


@functools.cache
def run(kind: str) -> Path:
    """A training run of a random student."""
    path = root() / f"{kind}-run"
    guidance = 3.5 if kind == "flux" else 4.0
    students.write_run(path, model(kind), ADAPTER[kind], Distillation(), guidance)
    (path / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0 / i}) + "\n" for i in range(1, 8)))
    return path


@functools.cache
def export(kind: str) -> Path:
    """The student in the authors' layout."""
    return export_adapter(run(kind), root() / f"{kind}-export", dtype=np.float32)


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same_arrays(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits."""
    left, right = arrays(a), arrays(b)
    return len(left) == len(right) and all(
        x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for x, y in zip(left, right, strict=True)
    )
