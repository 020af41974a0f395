"""Style LoRAs in every format, applied here, against diffusers' and PEFT's loaders on the shrunken twins.

diffusers' converters know `linear1` of the authors' layout only at the full width, and drop the layers outside of the
blocks of kohya's files. For these, the LoRA is added to the twin's weights in that layout.
"""

# r LoRA rank

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from arcflow_jax.convert.backbones import flux_original
from arcflow_jax.convert.backbones.flux_original import OUR_SINGLE
from arcflow_jax.convert.engine import import_tensors
from arcflow_jax.convert.style_lora import Names, read_lora
from arcflow_jax.families import flux, flux2, qwen_image
from arcflow_jax.families.family import Network
from arcflow_jax.loras import stacked
from arcflow_jax.models.style_loras import read_style_lora
from arcflow_jax.networks import style
from arcflow_jax.networks.layers import linear_layers
from arcflow_jax.networks.states import unflatten
from tests.convert.test_convert_original import original_flux
from tests.helpers.twins import (
    FLUX,
    FLUX2,
    QWEN_IMAGE,
    flux2_inputs,
    flux2_twin,
    flux2_twin_velocity,
    flux_inputs,
    flux_twin_output,
    qwen_inputs,
    qwen_twin,
    qwen_twin_velocity,
    randomize,
    relative_error,
    transformer_scale,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

Tensors = dict[str, np.ndarray]


class Twin:
    """A network here and in diffusers, with the same weights, and what each gives with a LoRA."""

    def __init__(self, network: Network, config: Any, twin: Any, inputs: tuple, theirs: Callable[[Any], np.ndarray]):
        self.network, self.config, self.twin, self.theirs = network, config, twin, theirs
        self.tensors = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
        self.layers = {
            name: tuple(module.weight.shape)
            for name, module in twin.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        abstract = network.abstract(config)
        graphdef, state = nnx.split(abstract)
        self.state = import_tensors(network.table, self.tensors, state)
        # One program for all formats: a LoRA of rank 16 on all layers
        self.applied = style.styled(graphdef, self.state, linear_layers(abstract), 16)
        self.run = jax.jit(lambda state: nnx.merge(self.applied.graphdef, state).teacher_velocity(*inputs))
        self.plain = theirs(twin)

    def ours(self, source: Path) -> np.ndarray:
        """Our velocity with the LoRA of a file or folder."""
        updates = read_style_lora(source, {"transformer": (self.network, self.config)})
        arrays = stacked(updates, self.applied.state, np.float32)
        with jax.default_matmul_precision("highest"):
            return self.run(nnx.merge_state(self.state, unflatten(self.applied.state, arrays)))

    def check(self, source: Path, expected: np.ndarray) -> None:
        assert relative_error(self.plain, expected) > 0.05  # the LoRA matters
        assert relative_error(self.ours(source), expected) < 1e-5

    def with_lora(self, pipeline: Any, tensors: Tensors | Path) -> np.ndarray:
        """The twin's velocity with a LoRA that diffusers' pipeline loads, from tensors or from a folder."""
        source = {name: torch.from_numpy(x) for name, x in tensors.items()} if isinstance(tensors, dict) else tensors
        twin, metadata = copy.deepcopy(self.twin), {"return_lora_metadata": True}
        options = {}
        if pipeline is diffusers.FluxPipeline:
            state, options["network_alphas"], meta = pipeline.lora_state_dict(source, return_alphas=True, **metadata)
        else:
            state, meta = pipeline.lora_state_dict(source, **metadata)
        pipeline.load_lora_into_transformer(state, transformer=twin, adapter_name="it", metadata=meta, **options)
        return self.theirs(twin)


@pytest.fixture(scope="module")
def flux_twin() -> Twin:
    twin = diffusers.FluxTransformer2DModel(**dataclasses.asdict(FLUX))
    randomize(twin, transformer_scale, lambda name: 0.02)
    inputs = flux_inputs(FLUX)
    return Twin(flux.FLUX, FLUX, twin, inputs, lambda twin: flux_twin_output(twin, *inputs))


@pytest.fixture(scope="module")
def qwen() -> Twin:
    inputs = qwen_inputs(QWEN_IMAGE, 4, 6, (7, 4))
    return Twin(
        qwen_image.QWEN_IMAGE,
        QWEN_IMAGE,
        qwen_twin(QWEN_IMAGE),
        inputs,
        lambda twin: qwen_twin_velocity(twin, *inputs, 4, 6),
    )


@pytest.fixture(scope="module")
def klein() -> Twin:
    inputs = flux2_inputs(FLUX2, 4, 6, 7)
    return Twin(flux2.FLUX2, FLUX2, flux2_twin(FLUX2), inputs, lambda twin: flux2_twin_velocity(twin, *inputs))


def lora(
    layers: Mapping[str, tuple[int, int]],
    name: Callable[[str], str],
    parts: tuple[str, str] = ("lora_A", "lora_B"),
    *,
    ranks: tuple[int, ...] = (4,),
    alphas: tuple[float, ...] = (),
) -> Tensors:
    """A random LoRA, of these ranks and alphas in turn, whose tensors are called name(layer) + part."""
    rng = np.random.default_rng(1)
    tensors = {}
    for i, (layer, (d_out, d_in)) in enumerate(layers.items()):
        rank = ranks[i % len(ranks)]
        tensors[f"{name(layer)}.{parts[0]}.weight"] = rng.standard_normal((rank, d_in)) / d_in**0.5
        tensors[f"{name(layer)}.{parts[1]}.weight"] = rng.standard_normal((d_out, rank)) * (0.2 / rank**0.5)
        if alphas:
            tensors[f"{name(layer)}.alpha"] = np.array(alphas[i % len(alphas)])
    return {name: x.astype(np.float32) for name, x in tensors.items()}


def write(folder: Path, tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> Path:
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata and {"lora_adapter_metadata": json.dumps(metadata)})
    return file


# --- diffusers and PEFT ---


@pytest.mark.parametrize("family", ["flux", "qwen", "klein"])
def test_diffusers(family, request, tmp_path):
    """On all linear layers, of several ranks."""
    twin = request.getfixturevalue({"flux": "flux_twin", "qwen": "qwen", "klein": "klein"}[family])
    pipelines = {
        "flux": diffusers.FluxPipeline,
        "qwen": diffusers.QwenImagePipeline,
        "klein": diffusers.Flux2KleinPipeline,
    }
    pipeline = pipelines[family]
    tensors = lora(twin.layers, "transformer.{}".format, ranks=(4, 7, 2))
    twin.check(write(tmp_path, tensors), twin.with_lora(pipeline, tensors))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_diffusers_with_the_config_in_the_metadata(family, rslora, request, tmp_path):
    twin = request.getfixturevalue({"flux": "flux_twin", "qwen": "qwen"}[family])
    pipeline = {"flux": diffusers.FluxPipeline, "qwen": diffusers.QwenImagePipeline}[family]
    layers = {name: shape for name, shape in twin.layers.items() if "attn" in name}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, alpha_pattern={"to_k": 2, "0.attn.to_v": 3.5}, use_rslora=rslora, target_modules=[*layers]
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    file = write(tmp_path, lora(layers, "transformer.{}".format), metadata)
    twin.check(file, twin.with_lora(pipeline, tmp_path))
    assert {update.scale for update in read_style_lora(file, {"transformer": (twin.network, twin.config)})} == {
        alpha / (2 if rslora else 4) for alpha in (6, 2, 3.5)
    }


def test_diffusers_with_alphas_among_the_tensors(flux_twin, tmp_path):
    layers = {name: shape for name, shape in flux_twin.layers.items() if name.startswith("single")}
    tensors = lora(layers, "transformer.{}".format, alphas=(8.0, 1.0))
    flux_twin.check(write(tmp_path, tensors), flux_twin.with_lora(diffusers.FluxPipeline, tensors))


def test_peft_folder(flux_twin, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_q", "proj_mlp", "ff.net.2"], rank_pattern={"to_q": 6}
    )
    theirs = peft.get_peft_model(copy.deepcopy(flux_twin.twin), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    flux_twin.check(tmp_path, flux_twin.theirs(theirs.base_model.model))


# --- kohya, XLabs, OneTrainer ---

OUTSIDE = ("img_in", "txt_in", "time_in", "guidance_in", "vector_in", "final_layer")


def original_layers(tensors: Tensors) -> dict[str, tuple[int, int]]:
    """The linear layers of the authors' layout, by name."""
    named = original_flux(tensors)
    return {name.removesuffix(".weight"): x.shape for name, x in named.items() if x.ndim == 2}


def from_original(changed: Tensors, like: Tensors) -> Tensors:
    """The inverse of `original_flux`, by numbers in place of values, which tell where each value goes."""
    sizes = np.cumsum([0, *(x.size for x in like.values())])
    numbers = {name: np.arange(x.size).reshape(x.shape) + i for (name, x), i in zip(like.items(), sizes, strict=False)}
    values = np.empty(sizes[-1], np.float32)
    for name, where in original_flux(numbers).items():
        values[where] = changed[name]
    return {name: values[where] for name, where in numbers.items()}


def kohya(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


DOWN_UP = ("lora_down", "lora_up")


def test_kohya_flux(flux_twin, tmp_path):
    layers = {
        name: shape
        for name, shape in original_layers(flux_twin.tensors).items()
        if not name.startswith(OUTSIDE) and not name.endswith("linear1")
    }
    tensors = lora(layers, kohya, DOWN_UP, ranks=(4, 6), alphas=(1.0, 4.0, 16.0))
    expected = flux_twin.with_lora(diffusers.FluxPipeline, dict(tensors))
    flux_twin.check(write(tmp_path, tensors), expected)


@pytest.mark.parametrize("name", [kohya, "diffusion_model.{}".format, "base_model.model.{}".format])
def test_all_layers_of_the_authors_layout(flux_twin, tmp_path, name):
    """The reference is the LoRA added to the weights in that layout."""
    layers, flat = original_layers(flux_twin.tensors), name is kohya
    parts, alphas = (DOWN_UP, (2.0, 3.0)) if flat else (("lora_A", "lora_B"), ())
    tensors = lora(layers, name, parts, alphas=alphas)
    changed = original_flux(flux_twin.tensors)
    for layer in layers:
        a, b = (tensors[f"{name(layer)}.{part}.weight"] for part in parts)
        scale = float(tensors[f"{name(layer)}.alpha"]) / len(a) if flat else 1.0
        changed[f"{layer}.weight"] = changed[f"{layer}.weight"] + scale * b @ a
    twin = copy.deepcopy(flux_twin.twin)
    twin.load_state_dict({name: torch.from_numpy(x) for name, x in from_original(changed, flux_twin.tensors).items()})
    flux_twin.check(write(tmp_path, tensors), flux_twin.theirs(twin))


def test_kohyas_linear1_at_full_width():
    """diffusers' converter splits it as ours does."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    widths = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 4 * 3072}
    kernels = {f"{OUR_SINGLE}.{name}.kernel": (38, 3072, width) for name, width in widths.items()}
    tensors = lora({"single_blocks.5.linear1": (7 * 3072, 3072)}, kohya, DOWN_UP, ranks=(2,), alphas=(5.0,))
    ours = read_lora(tensors, {"transformer": Names([flux_original], kernels)}, {}, "file")
    theirs = _convert_kohya_flux_lora_to_diffusers({name: torch.from_numpy(x) for name, x in tensors.items()})
    assert len(ours) == 4
    for update in ours:
        name = update.layer.replace(OUR_SINGLE, "transformer.single_transformer_blocks.5")
        a, b = (theirs[f"{name}.{part}.weight"].numpy() for part in ("lora_A", "lora_B"))
        assert update.index == 5
        np.testing.assert_allclose(update.b.T * update.scale @ update.a.T, b @ a, rtol=1e-5, atol=1e-6)


def test_xlabs(flux_twin, tmp_path):
    width, layers = FLUX.width, {}
    for i in range(FLUX.num_layers):
        for stream in "12":
            layers[f"double_blocks.{i}.processor.qkv_lora{stream}"] = (3 * width, width)
            layers[f"double_blocks.{i}.processor.proj_lora{stream}"] = (width, width)
    for i in range(FLUX.num_single_layers):
        layers[f"single_blocks.{i}.processor.qkv_lora"] = (3 * width, width)
        layers[f"single_blocks.{i}.processor.proj_lora"] = (width, 5 * width)
    tensors = lora(layers, str, ("down", "up"))
    flux_twin.check(write(tmp_path, tensors), flux_twin.with_lora(diffusers.FluxPipeline, tensors))


def test_kohya_qwen(qwen, tmp_path):
    layers = {name: shape for name, shape in qwen.layers.items() if not name.startswith(("norm_out", "txt_norm"))}
    tensors = lora(layers, kohya, DOWN_UP, ranks=(4, 8), alphas=(1.0, 4.0, 6.0))
    qwen.check(write(tmp_path, tensors), qwen.with_lora(diffusers.QwenImagePipeline, tensors))


@pytest.mark.parametrize("suffix", ["", ".default"])
def test_ai_toolkit_qwen(qwen, tmp_path, suffix):
    layers = {name: shape for name, shape in qwen.layers.items() if name.startswith("transformer_blocks")}
    tensors = lora(layers, "diffusion_model.{}".format, (f"lora_A{suffix}", f"lora_B{suffix}"))
    qwen.check(write(tmp_path, tensors), qwen.with_lora(diffusers.QwenImagePipeline, tensors))
