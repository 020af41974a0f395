"""The authors' own layout of FLUX.1 (flux1-dev.safetensors, ae.safetensors), against diffusers' conversion of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from arcflow_jax import schema
from arcflow_jax.cli.app import main
from arcflow_jax.convert.backbones import flux, flux_original
from arcflow_jax.convert.engine import check, export_tensors, fills, import_tensors, part
from arcflow_jax.errors import UserError
from arcflow_jax.families import flux as family
from arcflow_jax.models import conversion
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.backbones.flux import FluxConfig
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.vaes.kl import AutoencoderKLConfig
from tests.helpers.full_size import FLUX_DEV, FLUX_VAE
from tests.helpers.source_folder import CONFIGS, weights_file, write_source

# The authors' names, from their repository's modules: layers with weight and bias, and the norms' scales
DOUBLE = ["mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2"]
SINGLE = ["modulation.lin", "linear1", "linear2"]
NORMS = ["norm.query_norm.scale", "norm.key_norm.scale"]
OTHERS = [f"{mlp}.{layer}" for mlp in ("time_in", "guidance_in", "vector_in") for layer in ("in_layer", "out_layer")]
OTHERS += ["img_in", "txt_in", "final_layer.adaLN_modulation.1", "final_layer.linear"]


def published_names(double: int, single: int) -> set[str]:
    streams = [f"double_blocks.{i}.{stream}" for i in range(double) for stream in ("img", "txt")]
    blocks = [f"single_blocks.{i}" for i in range(single)]
    linears = [*OTHERS, *(f"{stream}_{name}" for stream in streams for name in DOUBLE)]
    linears += [f"{block}.{name}" for block in blocks for name in SINGLE]
    norms = [f"{stream}_attn.{name}" for stream in streams for name in NORMS]
    norms += [f"{block}.{name}" for block in blocks for name in NORMS]
    return {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")} | set(norms)


def flux_dev_shapes() -> dict[str, tuple[int, ...]]:
    config = schema.parse(FluxConfig, FLUX_DEV, "config.json")
    return shapes_of(nnx.state(family.FLUX.abstract(config)))


def source_shapes(table, shapes) -> dict[str, tuple[int, ...]]:
    return {name: fill.source_shape for fill in fills(table, shapes) for name in fill.names}


def test_full_size_names_and_shapes():
    shapes = flux_dev_shapes()
    theirs = source_shapes(flux_original, shapes)
    assert theirs.keys() == published_names(19, 38)
    assert len(theirs) == 780
    assert sum(map(np.prod, theirs.values())) == 11_901_408_320
    width = 24 * 128
    assert theirs["double_blocks.18.txt_attn.qkv.weight"] == (3 * width, width)
    assert theirs["single_blocks.37.linear1.weight"] == (7 * width, width)
    assert theirs["single_blocks.37.linear1.bias"] == (7 * width,)
    assert theirs["single_blocks.0.linear2.weight"] == (width, 5 * width)
    assert theirs["final_layer.adaLN_modulation.1.weight"] == (2 * width, width)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in theirs.items()}  # take no memory
    assert len(list(check(flux_original, tensors, shapes, "flux1-dev"))) == len(shapes)


def test_full_size_rows_go_where_diffusers_puts_them():
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    shapes = flux_dev_shapes()
    # One column that numbers the rows tells where each of them goes
    ours = {name: np.arange(shape[0])[:, None] for name, shape in source_shapes(flux_original, shapes).items()}
    checkpoint = {name: torch.from_numpy(rows) for name, rows in ours.items()}
    theirs = utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    assert not checkpoint
    assert theirs.keys() == source_shapes(flux, shapes).keys()
    expected = {fill.target: fill for fill in fills(flux, shapes)}
    for fill in fills(flux_original, shapes):
        swapped = "adaLN" in fill.names[0]
        for name, diffusers_name in zip(fill.names, expected[fill.target].names, strict=True):
            rows = part(ours[name], fill.rows)
            rows = fill.form.to_ours(rows).reshape(-1) if swapped else rows[:, 0]
            np.testing.assert_array_equal(rows, theirs[diffusers_name].numpy()[:, 0])


def test_full_size_vae():
    config = schema.parse(AutoencoderKLConfig, FLUX_VAE, "config.json")
    shapes = shapes_of(nnx.state(family.VAE.abstract(config)))
    theirs = source_shapes(family.VAE.original(config), shapes)
    assert len(theirs) == 244
    assert sum(map(np.prod, theirs.values())) == 83_819_683
    assert theirs["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert theirs["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert theirs["encoder.down.2.block.0.conv1.weight"] == (512, 256, 3, 3)
    assert theirs["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)


def original_flux(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' tensors of a FLUX transformer in the authors' layout, spelt out."""
    left = dict(tensors)
    result = {}

    def move(new: str, *old: str) -> None:
        for leaf in ("weight", "bias"):
            result[f"{new}.{leaf}"] = np.concatenate([left.pop(f"{name}.{leaf}") for name in old])

    for new, old in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")):
        move(f"{new}.in_layer", f"time_text_embed.{old}_embedder.linear_1")
        move(f"{new}.out_layer", f"time_text_embed.{old}_embedder.linear_2")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for i in range(sum(name.endswith("attn.to_out.0.bias") for name in tensors)):
        new, old = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, norm, q, out, ff, added in (
            ("img", "norm1", "to_{}", "to_out.0", "ff", ""),
            ("txt", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "added_"),
        ):
            move(f"{new}.{stream}_mod.lin", f"{old}.{norm}.linear")
            move(f"{new}.{stream}_attn.qkv", *(f"{old}.attn.{q.format(x)}" for x in "qkv"))
            move(f"{new}.{stream}_attn.proj", f"{old}.attn.{out}")
            move(f"{new}.{stream}_mlp.0", f"{old}.{ff}.net.0.proj")
            move(f"{new}.{stream}_mlp.2", f"{old}.{ff}.net.2")
            for x, norm_name in (("q", "query_norm"), ("k", "key_norm")):
                result[f"{new}.{stream}_attn.norm.{norm_name}.scale"] = left.pop(f"{old}.attn.norm_{added}{x}.weight")
    for i in range(sum(name.endswith("proj_mlp.bias") for name in tensors)):
        new, old = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        move(f"{new}.linear1", *(f"{old}.attn.to_{x}" for x in "qkv"), f"{old}.proj_mlp")
        move(f"{new}.linear2", f"{old}.proj_out")
        for x, norm_name in (("q", "query_norm"), ("k", "key_norm")):
            result[f"{new}.norm.{norm_name}.scale"] = left.pop(f"{old}.attn.norm_{x}.weight")
    move("final_layer.linear", "proj_out")
    for leaf in ("weight", "bias"):
        scale, shift = np.split(left.pop(f"norm_out.linear.{leaf}"), 2)
        result[f"final_layer.adaLN_modulation.1.{leaf}"] = np.concatenate([shift, scale])
    assert not left
    return result


def original_vae(tensors: Mapping[str, np.ndarray], levels: int) -> dict[str, np.ndarray]:
    """diffusers' tensors of a VAE in the authors' layout, spelt out."""
    result = {}
    for name, tensor in tensors.items():
        new = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        new = new.replace("conv_shortcut", "nin_shortcut").replace(".resnets.", ".block.")
        new = new.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        new = new.replace("down_blocks", "down")
        for level in range(levels):
            new = new.replace(f"up_blocks.{level}.", f"up.{levels - 1 - level}.")
        if ".attn_1." in new:
            for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
                new = new.replace(f".{ours}.", f".{theirs}.")
            new = new.replace("to_out.0", "proj_out")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        result[new] = tensor
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A diffusers folder and, in it, the same model's transformer and VAE as its authors would save them."""
    folder = tmp_path_factory.mktemp("pytorch") / "source"
    written = write_source(folder)
    save_file(original_flux(written["transformer"]), folder / "flux1-tiny.safetensors")
    save_file(original_vae(written["vae"], levels=2), folder / "ae.safetensors")
    return folder


def test_the_spelt_out_vae_is_what_diffusers_reads(source):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(source / "ae.safetensors").items()}
    blocks = {"down_block_types": [""] * 2, "up_block_types": [""] * 2}
    converted = utils.convert_ldm_vae_checkpoint(tensors, blocks)
    expected = load_file(weights_file(source, "vae"))
    assert converted.keys() == expected.keys()
    for name, tensor in converted.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name])


def test_both_layouts_make_the_same_model(source, tmp_path):
    expected = ModelDirectory.open(conversion.convert_model(source, tmp_path / "diffusers"))
    single = shutil.copytree(source, tmp_path / "source")
    for component in ("transformer", "vae"):
        weights_file(single, component).unlink()
    files = {"transformer": single / "flux1-tiny.safetensors", "vae": single / "ae.safetensors"}
    options = [option for component, file in files.items() for option in (f"--{component}", str(file))]
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--source", str(single), "--out", str(tmp_path / "original"), *options])
    assert not caught.value.code
    model = ModelDirectory.open(tmp_path / "original")
    assert model.fingerprint == expected.fingerprint
    for component in files:
        abstract = nnx.state(model.abstract(component))
        ours, theirs = model.load(component, abstract), expected.load(component, abstract)
        assert all(
            np.array_equal(a[...], b[...])
            for (_, a), (_, b) in zip(nnx.to_flat_state(ours), nnx.to_flat_state(theirs), strict=True)
        )


@pytest.mark.parametrize(
    ("file", "network", "config"),
    [("flux1-tiny.safetensors", family.FLUX, "transformer"), ("ae.safetensors", family.VAE, "vae")],
)
def test_written_back_in_the_layout_it_came_in(source, file, network, config):
    shape = schema.parse(network.config, CONFIGS[config], config)
    tensors = load_file(source / file)
    table = network.original(shape)
    back = export_tensors(table, import_tensors(table, tensors, nnx.state(network.abstract(shape))))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name], tensor)


def test_a_file_saved_as_part_of_a_larger_model(source, tmp_path):
    tensors = load_file(source / "flux1-tiny.safetensors")
    save_file({f"model.diffusion_model.{name}": x for name, x in tensors.items()}, tmp_path / "part.safetensors")
    files = {"transformer": tmp_path / "part.safetensors"}
    model = ModelDirectory.open(conversion.convert_model(source, tmp_path / "out", files=files))
    assert model.fingerprint == ModelDirectory.open(conversion.convert_model(source, tmp_path / "same")).fingerprint


def damaged(source: Path, path: Path, changes: Mapping[str, np.ndarray | None]) -> Path:
    tensors = load_file(source / "flux1-tiny.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


ZEROS = np.zeros((112, 16), np.float32)  # of linear1's shape, 7 · width × width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"single_blocks.1.linear1.weight": None}, r"1 missing \(single_blocks.1.linear1.weight\)$"),
        ({"single_blocks.3.linear1.weight": ZEROS}, r"1 left over \(single_blocks.3.linear1.weight\)$"),
        (
            {"single_blocks.1.linear1.weight": ZEROS[1:]},
            r"1 wrong \(single_blocks.1.linear1.weight is \[111, 16\] instead of \[112, 16\]\)$",
        ),
        (
            {"single_blocks.1.linear1.weight": ZEROS.astype(np.int8)},
            r"1 wrong \(single_blocks.1.linear1.weight is int8 instead of float32 or float16 or bfloat16\)$",
        ),
        ({"single_blocks.1.linear1.weight": ZEROS * np.nan}, r"single_blocks.1.linear1.weight holds NaN or infinite"),
    ],
)
def test_errors_name_the_tensor_of_the_file_once(source, tmp_path, changes, message):
    file = damaged(source, tmp_path / "damaged.safetensors", changes)
    with pytest.raises(UserError, match=rf"damaged.safetensors: {message}"):
        conversion.convert_model(source, tmp_path / "out", files={"transformer": file})
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_read(source, tmp_path):
    def refused(file: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            conversion.convert_model(source, tmp_path / "out", files={"vae": file})

    refused(tmp_path / "ae.safetensors", "ae.safetensors is missing")
    refused(source / "vae", "/vae is not a regular file")
    (tmp_path / "ae.ckpt").write_bytes(b"\x80\x04")
    refused(tmp_path / "ae.ckpt", "ae.ckpt is a pickle: unpickling runs any code that a file contains")
    refused(source / "flux1-tiny.safetensors", r"flux1-tiny.safetensors: \d+ missing")
    with pytest.raises(UserError, match="a FluxPipeline has no unet, only transformer, text_encoder"):
        conversion.convert_model(source, tmp_path / "out", files={"unet": source / "ae.safetensors"})
