"""The VAE's rule table: FLUX.1's full key list, and checkpoints from before diffusers 0.12."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.convert.engine import check, export_tensors, import_tensors
from arcflow_jax.convert.vaes import kl as table
from arcflow_jax.families import flux as family
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.vaes.kl import AutoencoderKLConfig
from tests.helpers.full_size import FLUX_VAE

TINY = AutoencoderKLConfig(
    block_out_channels=(4, 8, 8),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
    scaling_factor=0.5,
    shift_factor=0.1,
)


def test_full_size():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**FLUX_VAE, **blocks)
    config = schema.parse(AutoencoderKLConfig, dict(model.config), "config.json")
    shapes = shapes_of(nnx.state(family.VAE.abstract(config)))
    # arrays of the checkpoint's shapes that take no memory
    tensors = {name: np.broadcast_to(np.float32(0), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    used = [group for _, group in check(table, tensors, shapes, "FLUX's VAE")]
    assert sum(map(len, used)) == len(tensors) == 244
    assert sum(np.prod(shape) for shape in shapes.values()) == 83_819_683


def test_old_names_of_the_attention_layers():
    abstract = nnx.state(family.VAE.abstract(TINY))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), abstract)
    tensors = export_tensors(table, state)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new_part, old_part in old.items():
            name = name.replace(f"attentions.0.{new_part}.", f"attentions.0.{old_part}.")
        renamed[name] = tensor
    assert len(renamed.keys() - tensors.keys()) == 16
    jax.tree.map(np.testing.assert_array_equal, import_tensors(table, renamed, abstract), state)
