"""Files of style LoRAs: where they are found, what is refused and why, and what is fused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from arcflow_jax import schema
from arcflow_jax.convert.engine import export_tensors, import_tensors
from arcflow_jax.convert.style_lora import Update
from arcflow_jax.errors import UserError
from arcflow_jax.families import flux
from arcflow_jax.loras import stacked
from arcflow_jax.models.style_loras import find, fused_layers, read_style_lora, split_scale
from arcflow_jax.networks import style
from arcflow_jax.networks.backbones.flux import FluxConfig
from arcflow_jax.networks.states import unflatten
from arcflow_jax.networks.text.clip import CLIPTextConfig
from arcflow_jax.networks.text.t5 import T5Config
from tests.helpers import fake_hub
from tests.helpers.loras import write_lora
from tests.helpers.source_folder import CONFIGS
from tests.helpers.twins import random_network, relative_error

CONFIG = schema.parse(FluxConfig, CONFIGS["transformer"], "config.json")
NETWORKS = {"transformer": (flux.FLUX, CONFIG)}
LAYER = "transformer.transformer_blocks.1.attn.to_k"
D = CONFIG.width


def changed(folder: Path, changes: Mapping[str, np.ndarray | None]) -> Path:
    """A LoRA of rank 4 on one layer, with some tensors changed, or left out."""
    file = write_lora(folder / "lora.safetensors", layers={LAYER: (D, D)})
    tensors = load_file(file) | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, file)
    return file


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector.weight": "DoRA",
    "lokr_w1": "LoKr",
    "hada_w1_a": "LoHa",
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_kinds_are_refused_by_name(tmp_path, name):
    file = changed(tmp_path, {f"{LAYER}.{name}": zeros(D, 1)})
    with pytest.raises(UserError, match=rf"lora.safetensors is a {OTHER_KINDS[name]}, not a LoRA: .* {LAYER}.{name}"):
        read_style_lora(file, NETWORKS)


def test_dora_in_the_config(tmp_path):
    file = write_lora(tmp_path / "adapter_model.safetensors", layers={LAYER: (D, D)})
    file.with_name("adapter_config.json").write_text('{"lora_alpha": 4, "use_dora": true}')
    with pytest.raises(UserError, match="is a DoRA, not a LoRA: its config has use_dora"):
        read_style_lora(tmp_path, NETWORKS)


A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.norm.lora_A.weight": zeros(4, D)}, r"1 unknown \(transformer.norm.lora_A.weight\)"),
        ({f"{LAYER}.lora_B.bias": zeros(D)}, rf"1 unknown \({LAYER}.lora_B.bias\)"),
        ({f"{LAYER}.diff_b": zeros(D)}, rf"1 unknown \({LAYER}.diff_b\)"),
        ({A.replace("_blocks.1", "_blocks.2"): zeros(4, D)}, r"1 unknown \(transformer.transformer_blocks.2.attn.to_k"),
        ({A.replace("transformer.", "text_encoder.", 1): zeros(4, D)}, r"1 unknown \(text_encoder.transformer_blocks"),
        ({A: None}, rf"1 missing \(A beside {B}\)$"),
        ({B: None}, rf"1 missing \(B beside {A}\)$"),
        ({A: zeros(4, D + 1)}, rf"1 wrong \({A} is \[4, 17\] instead of \[4, 16\]\)"),
        ({B: zeros(D, 5)}, rf"1 wrong \({B} is \[16, 5\] instead of \[16, 4\]\)"),
        ({A: zeros(0, D), B: zeros(D, 0)}, rf"1 wrong \({A} has rank 0\)"),
        ({A: None, B: zeros(D, 0)}, rf"1 missing \(A beside {B}\); 1 wrong \({B} has rank 0\)"),
        ({A: zeros(4, D).astype(np.int8)}, rf"1 wrong \({A} is int8\)"),
        ({f"{LAYER}.alpha": zeros(2)}, rf"1 wrong \({LAYER}.alpha is \[2\] instead of one number\)"),
        (
            {"lora_unet_double_blocks_1_img_attn_proj.alpha": np.array(1.0, np.float32)},
            r"2 missing \(A beside lora_unet_double_blocks_1_img_attn_proj.alpha, B beside .*\)$",
        ),
        ({A.removeprefix("transformer."): zeros(4, D)}, r"two names of one tensor"),
    ],
)
def test_every_tensor_is_used_or_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"lora.safetensors does not fit the model: .*{message}"):
        read_style_lora(changed(tmp_path, changes), NETWORKS)


@pytest.mark.parametrize("name", [A, B])
def test_values_that_are_not_finite(tmp_path, name):
    bad = zeros(*(4, D) if name == A else (D, 4)) * np.nan
    with pytest.raises(UserError, match=rf"{name} holds NaN or infinite values"):
        read_style_lora(changed(tmp_path, {name: bad}), NETWORKS)


def test_damaged_configs(tmp_path):
    file = write_lora(tmp_path / "adapter_model.safetensors", layers={LAYER: (D, D)})
    config = file.with_name("adapter_config.json")
    config.write_text('{"lora_alpha": "four"}')
    with pytest.raises(UserError, match=r"adapter_config.json: lora_alpha is 'four'"):
        read_style_lora(file, NETWORKS)
    config.write_text('{"lora_alpha": 4, "alpha_pattern": {"(": 1}}')
    with pytest.raises(UserError, match="is no regular expression"):
        read_style_lora(file, NETWORKS)
    config.write_text('{"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 1}}')
    with pytest.raises(UserError, match="which repeats a group"):
        read_style_lora(file, NETWORKS)


# --- places ---


def test_places(tmp_path):
    file = write_lora(tmp_path / "one.safetensors", layers={LAYER: (D, D)})
    assert find(file) == find(tmp_path) == file
    other = write_lora(tmp_path / "two.safetensors", layers={LAYER: (D, D)})
    with pytest.raises(UserError, match=r"holds several files \(one.safetensors, two.safetensors\): name the file"):
        find(tmp_path)
    named = other.rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert find(tmp_path) == named
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.safetensors file: name the file"):
        find(tmp_path / "empty")
    with pytest.raises(UserError, match=r"LoRA .*missing\.safetensors does not exist"):
        find(tmp_path / "missing.safetensors")
    (tmp_path / "lora.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="is a pickle"):
        read_style_lora(tmp_path / "lora.ckpt", NETWORKS)
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds no LoRA"):
        read_style_lora(tmp_path / "none.safetensors", NETWORKS)


def test_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "remote"
    (folder / "styles").mkdir(parents=True)
    for file in ("pytorch_lora_weights.safetensors", "styles/own.safetensors", "large.safetensors"):
        write_lora(folder / file, layers={LAYER: (D, D)})
    with fake_hub.serving(folder, tmp_path / "cache", monkeypatch) as hub:
        assert len(read_style_lora(fake_hub.ID, NETWORKS)) == 1
        assert find(f"{fake_hub.ID}/styles/own.safetensors").name == "own.safetensors"
        assert hub.fetched == ["pytorch_lora_weights.safetensors", "styles/own.safetensors"]
        with pytest.raises(UserError, match=rf"name the file, {fake_hub.ID}/FILE.safetensors"):
            find(f"{fake_hub.ID}/styles")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", 1.0)),
        ("style.safetensors:0.8", ("style.safetensors", 0.8)),
        ("owner/name:-1", ("owner/name", -1.0)),
        ("hf:owner/name", ("hf:owner/name", 1.0)),
        ("gs://bucket/style.safetensors", ("gs://bucket/style.safetensors", 1.0)),
        ("gs://bucket/style.safetensors:2", ("gs://bucket/style.safetensors", 2.0)),
    ],
)
def test_split_scale(text, expected):
    assert split_scale(text) == expected


@pytest.mark.parametrize("scale", ["nan", "inf", "-1e9"])
def test_scales_that_are_refused(scale):
    with pytest.raises(UserError, match=r"scale of LoRA style\.safetensors"):
        split_scale(f"style.safetensors:{scale}")


# --- values ---


def test_fused_layers():
    rng = np.random.default_rng(0)
    layers = rng.standard_normal((3, 5, 4)).astype(np.float16)
    a, b = rng.standard_normal((5, 2)), rng.standard_normal((2, 4))
    updates = [Update("transformer", "x", index, a, b, scale) for index, scale in ((1, 0.5), (1, 2.0), (2, -1.0))]
    found = np.stack(list(fused_layers(iter(layers), updates, "x")))
    assert found.dtype == np.float16
    expected = layers + np.array([0, 2.5, -1.0])[:, None, None] * (a @ b)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)
    (one,) = fused_layers(iter(layers[:1]), [Update("transformer", "x", None, a, b, 1e9)._replace(scale=0.0)], "x")
    np.testing.assert_array_equal(one, layers[0])
    with pytest.raises(UserError, match="x holds NaN or infinite values"):
        list(fused_layers(iter(layers), [updates[0]._replace(scale=1e9)], "x"))


ENCODERS = {
    "text_encoder": (flux.CLIP, CLIPTextConfig, "lora_te1_"),
    "text_encoder_2": (flux.T5, T5Config, "lora_te3_"),
}


@pytest.mark.parametrize("component", ENCODERS)
def test_all_layers_of_a_text_encoder(component, tmp_path):
    """The reference is the LoRA added to the encoder's weights under the names of transformers."""
    network, config_class, prefix = ENCODERS[component]
    config = schema.parse(config_class, CONFIGS[component], component)
    graphdef, state = nnx.split(random_network(lambda: network.build(config, np.float32, nnx.Rngs(0))))
    tensors = export_tensors(network.table, state)
    layers = {
        name.removesuffix(".weight"): x.shape
        for name, x in tensors.items()
        if x.ndim == 2 and "embedding" not in name and "shared" not in name and "bias" not in name
    }
    names = {layer: prefix + layer.replace(".", "_") for layer in layers}
    file = write_lora(tmp_path / "te.safetensors", layers={names[layer]: shape for layer, shape in layers.items()})
    lora = load_file(file)
    fused = dict(tensors)
    for layer in layers:
        a, b = (lora[f"{names[layer]}.lora_{part}.weight"] for part in "AB")
        fused[f"{layer}.weight"] = tensors[f"{layer}.weight"] + b @ a
    ids = np.array([[3, 5, 9, 2, 19]])
    updates = read_style_lora(file, {component: (network, config)})
    applied = style.styled(graphdef, state, {update.layer for update in updates}, 16)
    beside = nnx.merge_state(state, unflatten(applied.state, stacked(updates, applied.state, np.float32)))

    def output(graphdef: nnx.GraphDef, state: nnx.State) -> np.ndarray:
        found = jax.jit(lambda state: nnx.merge(graphdef, state)(ids))(state)
        return np.asarray(found[0] if isinstance(found, tuple) else found)

    expected = output(graphdef, import_tensors(network.table, fused, state))
    assert relative_error(output(graphdef, state), expected) > 0.05
    assert relative_error(output(applied.graphdef, beside), expected) < 1e-5
