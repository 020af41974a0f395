"""A third model family in this one file, from its PyTorch folder to an exported student.

It shows that nothing outside `families/` has to change for a new family. The transformer, its conditioning, its prompts
and its table are defined here; the text encoder and the VAE are those of FLUX.1.
"""

# B batch, N image tokens, T text tokens, D width, H heads, E head dim

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from arcflow_jax import families, schema
from arcflow_jax.checkpoints.student_formats import export_adapter, import_adapter
from arcflow_jax.checkpoints.training import load_adapter
from arcflow_jax.convert.engine import export_tensors
from arcflow_jax.convert.rules import Rule, linear
from arcflow_jax.demo import ASSETS
from arcflow_jax.families import Family, Network
from arcflow_jax.families.flux import T5, VAE
from arcflow_jax.families.latents import position_ids
from arcflow_jax.families.text import Model, PromptEncoder
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.attention import attention
from arcflow_jax.networks.conditioning import interleave
from arcflow_jax.networks.layers import TEACHER, LayerNorm, Linear, Mode, RMSNorm, scan_blocks, stack
from arcflow_jax.networks.states import flatten
from arcflow_jax.networks.student import ArcModel, split_model
from arcflow_jax.parallel.mesh import batched, replicated
from arcflow_jax.parallel.processes import from_rows
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe, read_config
from tests.helpers.paths import CONFIGS

PROMPTS = ["a red circle", "a green square", "a blue ring on the left", "a large yellow triangle"]


# --- the family ---


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    in_channels: int
    width: int
    num_layers: int
    num_attention_heads: int
    text_width: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyConditioning:
    text: jax.Array  # [B, T, text width]
    lengths: jax.Array  # [B]: tokens of each prompt that are not padding
    positions: jax.Array  # [N, 3]

    @property
    def batch_size(self) -> int:
        return len(self.text)

    def repeat(self, times: int) -> ToyConditioning:
        text, lengths = (jnp.repeat(x, times, axis=0) for x in (self.text, self.lengths))
        return ToyConditioning(text, lengths, self.positions)

    def paired(self, negative: ToyConditioning) -> ToyConditioning:
        text, lengths = interleave(self.text, negative.text), interleave(self.lengths, negative.lengths)
        return ToyConditioning(text, lengths, self.positions)


class ToyBlock(nnx.Module):
    """Image tokens attend to themselves and to the text, then pass an MLP."""

    def __init__(self, config: ToyConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        self.norm = RMSNorm(config.width, eps=1e-6, dtype=dtype)
        self.query, self.key, self.value, self.out = (
            Linear(config.width, config.width, dtype=dtype, rngs=rngs) for _ in range(4)
        )
        self.up = Linear(config.width, 2 * config.width, dtype=dtype, rngs=rngs)
        self.down = Linear(2 * config.width, config.width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, image: jax.Array, text: jax.Array, lengths: jax.Array, mode: Mode) -> jax.Array:
        x = self.norm(image)
        seen = jnp.concatenate([x, text], axis=1)

        def heads(y: jax.Array) -> jax.Array:  # [B, S, D] -> [B, S, H, E]
            return y.reshape(*y.shape[:2], self.heads, -1)

        found = attention(heads(self.query(x)), heads(self.key(seen)), heads(self.value(seen)), x.shape[1] + lengths)
        image = image + self.out(found.reshape(x.shape))
        return image + self.down(jax.nn.silu(self.up(self.norm(image), mode)), mode)


class ToyTransformer(nnx.Module):
    """A `Backbone`."""

    def __init__(self, config: ToyConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        options = {"axes": (None, "embed"), "dtype": dtype, "rngs": rngs}
        self.image_in = Linear(config.in_channels, config.width, **options)
        self.position_in = Linear(3, config.width, bias=False, **options)
        self.text_in = Linear(config.text_width, config.width, **options)
        self.time_in = Linear(2, config.width, **options)
        self.blocks = stack(lambda rngs: ToyBlock(config, dtype=dtype, rngs=rngs), config.num_layers, rngs)

    def __call__(
        self, tokens: jax.Array, sigma: jax.Array, conditioning: ToyConditioning, mode: Mode = TEACHER
    ) -> tuple[jax.Array, jax.Array]:
        time = jnp.stack([jnp.cos(3 * sigma), jnp.sin(3 * sigma)], axis=-1).astype(self.dtype)
        temb = self.time_in(time)  # [B, D]
        text = LayerNorm(self.config.width, eps=1e-6, affine=False)(self.text_in(conditioning.text.astype(self.dtype)))
        image = self.image_in(tokens.astype(self.dtype)) + self.position_in(conditioning.positions.astype(self.dtype))

        def run(block: ToyBlock, image: jax.Array, mode: Mode) -> jax.Array:
            return block(image, text, conditioning.lengths, mode)

        return scan_blocks(self.blocks, image + temb[:, None], run, mode), temb


class ToyTable:
    LAYERS: ClassVar = ("query", "key", "value", "out", "up", "down")
    RULES: ClassVar = (
        *linear("image_in", "backbone.image_in"),
        linear("position_in", "backbone.position_in")[0],
        *linear("text_in", "backbone.text_in"),
        *linear("time_in", "backbone.time_in"),
        Rule("blocks.{layer}.norm.weight", "backbone.blocks.norm.scale"),
        *(rule for name in LAYERS for rule in linear(f"blocks.{{layer}}.{name}", f"backbone.blocks.{name}")),
        *linear("norm_out.linear", "output.norm_out.linear"),
        *linear("proj_out", "output.proj_out"),
    )


class ToyPrompts(PromptEncoder):
    ENCODERS: ClassVar = {"text_encoder": "tokenizer"}
    MAX_TOKENS = 16

    def _embed(
        self, states: Mapping[str, nnx.State], prompts: Sequence[str]
    ) -> tuple[dict[str, jax.Array], np.ndarray]:
        encoder = self.encoders["text_encoder"]
        ids, cut = encoder.ids(prompts)
        self.cut += int(cut.sum())
        lengths = (ids != encoder.tokenizer.pad_token_id).sum(1).astype(np.int32)
        text = encoder(states["text_encoder"], ids, self.mesh)
        return {"text": text, "lengths": from_rows(lengths, self.mesh)}, cut

    @staticmethod
    def conditioning(
        model: Model, mesh: Mesh, embedded: Mapping[str, jax.Array], *, guidance: float, rows: int, columns: int
    ) -> ToyConditioning:
        return ToyConditioning(embedded["text"], embedded["lengths"], jnp.asarray(position_ids(rows, columns)))

    @staticmethod
    def abstract_conditioning(model: Model, mesh: Mesh, batch: int, tokens: int, dtype: Any) -> ToyConditioning:
        width, split = model.config("transformer").text_width, batched(mesh)
        return ToyConditioning(
            jax.ShapeDtypeStruct((batch, ToyPrompts.MAX_TOKENS, width), dtype, sharding=split),
            jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split),
            jax.ShapeDtypeStruct((tokens, 3), jnp.float32, sharding=replicated(mesh)),
        )


def teacher(config: ToyConfig, dtype: Any, rngs: nnx.Rngs) -> ArcModel:
    return ArcModel(ToyTransformer(config, dtype=dtype, rngs=rngs), param_dtype=dtype, rngs=rngs)


FAMILY = Family(
    pipeline="ToyPipeline",
    networks={
        "transformer": Network("ToyTransformer2DModel", ToyConfig, teacher, ToyTable),
        "text_encoder": T5,
        "vae": VAE,
    },
    prompts=ToyPrompts,
    lora_targets=("blocks.up", "blocks.down"),
    cfg_guidance=2.0,
)

# --- its test ---

SETTINGS: dict[str, dict[str, Any]] = {
    "transformer": {"in_channels": 16, "width": 32, "num_layers": 2, "num_attention_heads": 2, "text_width": 24},
    "text_encoder": {"vocab_size": 123, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "vae": {
        "block_out_channels": [4, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "sample_size": 8,
    },
}


def write_source(folder: Path) -> dict[str, np.ndarray]:
    """Writes the PyTorch folder, with random weights, and returns the transformer's tensors."""
    index: dict[str, Any] = {
        "_class_name": FAMILY.pipeline,
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    tensors = {}
    for component, network in FAMILY.networks.items():
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(SETTINGS[component]))
        built = network.build(schema.parse(network.config, SETTINGS[component], component), np.float32, nnx.Rngs(0))
        tensors[component] = export_tensors(network.table, nnx.state(built))
        save_file(tensors[component], folder / component / "model.safetensors")
        index[component] = ["library", network.class_name]
    shutil.copytree(ASSETS / "tiny-flux" / "tokenizer_2", folder / "tokenizer")
    shutil.copytree(ASSETS / "tiny-flux" / "scheduler", folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return tensors["transformer"]


def recipe(model: Path, out: Path) -> Recipe:
    """Two training steps with CFG on the teacher."""
    prompts = out.with_name("prompts.txt")
    prompts.write_text("\n".join(PROMPTS))
    config = read_config(str(CONFIGS / "tiny.py"))
    with config.unlocked():
        config.update(model=str(model), prompts=str(prompts), out=str(out), resolutions=((8, 8),), batch=4, steps=2)
        config.update(log_every=1, save_every=2, mesh=(1, 1, 1, 1), preview_every=0, guidance=FAMILY.cfg_guidance)
        config.adapter.update(modes=3, rank=2, alpha=2.0, targets=FAMILY.lora_targets)
        config.distillation.update(decay=3, states=2, teacher_guidance="cfg", negative_prompt="a blue square")
    return Recipe.from_config(config)


def sampled(model: Path, adapter: Path | None, **settings: Any) -> np.ndarray:  # [B, H, W, 3]
    """Two images of one seed."""
    images = ArcFlowPipeline.from_pretrained(model, adapter=adapter)(PROMPTS[:2], seed=0, **settings).images
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture
def registered():
    families.register(FAMILY)
    yield
    del families._FAMILIES[FAMILY.pipeline]


def test_convert_train_sample_export(registered, tmp_path):
    tensors = write_source(tmp_path / "source")
    model = convert_model(tmp_path / "source", tmp_path / "model")
    directory = ModelDirectory.open(model)
    assert directory.family is FAMILY
    loaded = directory.load("transformer", nnx.state(directory.abstract("transformer")))
    jax.tree.map(np.testing.assert_array_equal, export_tensors(ToyTable, loaded), tensors)

    run = train(recipe(model, tmp_path / "run"))
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert min(losses) > 0

    by_student, by_teacher = (
        sampled(model, run),
        sampled(model, None, num_inference_steps=2, negative_prompt="a blue square"),
    )
    for images in (by_student, by_teacher):
        assert images.shape == (2, 8, 8, 3)
        assert images.std() > 0
        assert (images[0] != images[1]).any()

    exported = export_adapter(run, tmp_path / "export", dtype=np.float32)
    config = json.loads((exported / "config.json").read_text())
    assert config["_class_name"] == "ArcToyTransformer2DModel"
    assert SETTINGS["transformer"].items() <= config.items()
    file = exported / "diffusion_pytorch_model.safetensors"
    assert load_file(file)["blocks.1.up.lora_B.weight"].shape == (64, 2)

    # What was exported samples as the run does, and comes back as the run's EMA weights
    np.testing.assert_array_equal(sampled(model, exported), by_student)
    imported = import_adapter(exported, model, tmp_path / "imported", steps=2)
    ours, back = ema(directory, run), ema(directory, imported)
    assert ours.keys() == back.keys()
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight[...], back[name][...], err_msg=name)


def ema(directory: ModelDirectory, run: Path) -> dict[str, nnx.Variable]:
    """The EMA weights of a run, by path."""
    description, checkpoints = load_adapter(run, directory.fingerprint)
    _, _, abstract = split_model(directory.student(description.adapter, jnp.float32))
    with checkpoints:
        return flatten(checkpoints.restore_adapter(abstract))
