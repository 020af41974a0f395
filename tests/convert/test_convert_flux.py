"""The transformer's rule table: FLUX.1-dev's full key list, and a round trip through diffusers' own names."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.backbones import flux as table
from arcflow_jax.convert.engine import check, export_tensors, import_tensors
from arcflow_jax.errors import UserError
from arcflow_jax.families import flux as family
from arcflow_jax.networks.backbones.flux import FluxConfig
from arcflow_jax.networks.states import shapes_of
from tests.helpers.full_size import FLUX_DEV

TINY = FluxConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
)


def abstract_state(config: FluxConfig) -> nnx.State:
    return nnx.state(family.FLUX.abstract(config))


def random_state(config: FluxConfig) -> nnx.State:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), abstract_state(config))


def test_full_size():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**FLUX_DEV)
    config = schema.parse(FluxConfig, dict(model.config), "config.json")
    shapes = shapes_of(abstract_state(config))
    # arrays of the checkpoint's shapes that take no memory
    tensors = {name: np.broadcast_to(np.float32(0), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    used = [group for _, group in check(table, tensors, shapes, "FLUX.1-dev")]
    assert sum(map(len, used)) == len(tensors) == 1160
    assert sum(np.prod(shape) for shape in shapes.values()) == 11_901_408_320


@pytest.mark.parametrize("guidance", [True, False])
def test_export_is_loaded_by_diffusers_and_comes_back(guidance):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = dataclasses.replace(TINY, guidance_embeds=guidance)
    state = random_state(config)
    model = diffusers.FluxTransformer2DModel(**dataclasses.asdict(config))
    exported = export_tensors(table, state)
    model.load_state_dict({name: torch.from_numpy(tensor.copy()) for name, tensor in exported.items()}, strict=True)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    jax.tree.map(np.testing.assert_array_equal, import_tensors(table, tensors, abstract_state(config)), state)


def test_guidance_must_be_as_the_config_says():
    tensors = export_tensors(table, random_state(TINY))
    without = dataclasses.replace(TINY, guidance_embeds=False)
    with pytest.raises(UserError, match=r"4 left over \(time_text_embed.guidance_embedder"):
        import_tensors(table, tensors, abstract_state(without))
    with pytest.raises(UserError, match=r"4 missing \(time_text_embed.guidance_embedder"):
        import_tensors(table, export_tensors(table, random_state(without)), abstract_state(TINY))


def test_number_of_layers_must_be_as_the_config_says():
    tensors = export_tensors(table, random_state(TINY))
    fewer = dataclasses.replace(TINY, num_single_layers=2)
    with pytest.raises(UserError, match=r"14 left over \(single_transformer_blocks.2"):
        import_tensors(table, tensors, abstract_state(fewer))
    more = dataclasses.replace(TINY, num_single_layers=4)
    with pytest.raises(UserError, match=r"14 missing \(single_transformer_blocks.3"):
        import_tensors(table, tensors, abstract_state(more))
