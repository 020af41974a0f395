"""FLUX.2's rule tables: the full key lists of [klein] 4B and 9B and of dev, in both layouts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.backbones import flux2, flux2_original
from arcflow_jax.convert.engine import check, export_tensors, fills, import_tensors, part
from arcflow_jax.networks import layers
from arcflow_jax.networks.backbones.flux2 import Flux2, Flux2Config
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.student import ArcModel
from tests.helpers.twins import FLUX2, flux2_twin

KLEIN_4B = Flux2Config(
    in_channels=128,
    num_layers=5,
    num_single_layers=20,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=7680,
    guidance_embeds=False,
)
SIZES = {
    "klein 4B": KLEIN_4B,
    "klein 9B": dataclasses.replace(
        KLEIN_4B, num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12_288
    ),
    "dev": dataclasses.replace(
        KLEIN_4B,
        num_layers=8,
        num_single_layers=48,
        num_attention_heads=48,
        joint_attention_dim=15_360,
        guidance_embeds=True,
    ),
}


def shapes_for(config: Flux2Config) -> dict[str, tuple[int, ...]]:
    def make() -> ArcModel:
        return ArcModel(Flux2(config, rngs=nnx.Rngs(0)), bias=False, param_dtype=np.float32, rngs=nnx.Rngs(0))

    return shapes_of(nnx.state(layers.abstract(make)))


def theirs(config: Flux2Config):
    """diffusers' model, without memory."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.Flux2Transformer2DModel(**dataclasses.asdict(config))


@pytest.mark.parametrize("size", SIZES)
def test_full_size(size):
    config = SIZES[size]
    model = theirs(config)
    assert schema.parse(Flux2Config, dict(model.config), "config.json") == config
    shapes = shapes_for(config)
    # arrays of the checkpoint's shapes that take no memory
    tensors = {name: np.broadcast_to(np.float32(0), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    used = [group for _, group in check(flux2, tensors, shapes, size)]
    assert sum(map(len, used)) == len(tensors)
    assert sum(map(np.prod, shapes.values())) == sum(tensor.size for tensor in tensors.values())


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_the_single_file_go_where_diffusers_puts_them(size):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    shapes = shapes_for(SIZES[size])
    # One column that numbers the rows tells where each of them goes
    heights = {name: fill.source_shape[0] for fill in fills(flux2_original, shapes) for name in fill.names}
    ours = {name: np.arange(height)[:, None] for name, height in heights.items()}
    converted = utils.convert_flux2_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(rows) for name, rows in ours.items()}
    )
    assert converted.keys() == theirs(SIZES[size]).state_dict().keys()
    expected = {fill.target: fill for fill in fills(flux2, shapes)}
    for fill in fills(flux2_original, shapes):
        swapped = "adaLN" in fill.names[0]
        for name, diffusers_name in zip(fill.names, expected[fill.target].names, strict=True):
            rows = part(ours[name], fill.rows)
            rows = fill.form.to_ours(rows).reshape(-1) if swapped else rows[:, 0]
            np.testing.assert_array_equal(rows, converted[diffusers_name].numpy()[:, 0])


def test_both_layouts_there_and_back():
    tensors = {name: tensor.numpy() for name, tensor in flux2_twin(FLUX2).state_dict().items()}
    abstract = nnx.state(
        layers.abstract(
            lambda: ArcModel(Flux2(FLUX2, rngs=nnx.Rngs(0)), bias=False, param_dtype=np.float32, rngs=nnx.Rngs(0))
        )
    )
    state = import_tensors(flux2, tensors, abstract)
    original = export_tensors(flux2_original, state)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    back = export_tensors(flux2, import_tensors(flux2_original, prefixed, abstract))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
