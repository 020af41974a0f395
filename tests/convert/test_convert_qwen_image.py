"""Qwen-Image's rule table: the full key list, a round trip, and the names of LoRA in the authors' export."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from arcflow_jax import schema
from arcflow_jax.convert.adapter import AdapterTable
from arcflow_jax.convert.backbones import qwen_image as table
from arcflow_jax.convert.engine import check, export_tensors, fills, import_tensors
from arcflow_jax.errors import UserError
from arcflow_jax.families import qwen_image as family
from arcflow_jax.networks.backbones.qwen_image import QwenImageConfig
from arcflow_jax.networks.layers import linear_layers
from arcflow_jax.networks.states import shapes_of
from arcflow_jax.networks.student import AdapterConfig, split_model
from arcflow_jax.parallel.mesh import MESH_AXES, state_shardings
from arcflow_jax.storage.files import read_json
from arcflow_jax.training.recipe import Recipe, read_config
from tests.helpers.paths import CONFIGS

QWEN_IMAGE = QwenImageConfig(
    in_channels=64, num_layers=60, attention_head_dim=128, num_attention_heads=24, joint_attention_dim=3584
)
TINY = QwenImageConfig(
    in_channels=16,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    axes_dims_rope=(2, 2, 4),
)


def abstract_state(config: QwenImageConfig) -> nnx.State:
    return nnx.state(family.QWEN_IMAGE.abstract(config))


def random_state(config: QwenImageConfig) -> nnx.State:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), abstract_state(config))


def count(state) -> int:
    return sum(int(np.prod(shape)) for shape in shapes_of(state).values())


def test_full_size():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel()
    assert schema.parse(QwenImageConfig, dict(model.config), "config.json") == QWEN_IMAGE
    state = abstract_state(QWEN_IMAGE)
    # arrays of the checkpoint's shapes that take no memory
    tensors = {name: np.broadcast_to(np.float32(0), tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    used = [group for _, group in check(table, tensors, shapes_of(state), "Qwen-Image")]
    assert sum(map(len, used)) == len(tensors) == 1933
    assert count(state) == 20_430_401_088


@pytest.mark.parametrize(("recipe", "rank"), [("published", 256), ("compact", 64)])
def test_full_size_student_is_the_authors(recipe, rank):
    """Parameters and LoRA modules of the published recipe, as counted in the authors' own model; of a smaller rank."""
    adapter = Recipe.from_config(read_config(f"qwen:{recipe}")).adapter.with_targets(family.FAMILY.lora_targets)
    assert (adapter.modes, adapter.rank, adapter.alpha) == (16, rank, rank)
    _, _, trained = split_model(family.QWEN_IMAGE.student(QWEN_IMAGE, adapter, jnp.float32))
    assert count(trained) == 960_687_228 - 938_278_912 + 938_278_912 * rank // 256
    names = {name for fill in fills(AdapterTable(table), shapes_of(trained)) for name in fill.names}
    modules = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
    assert len(modules) == 240
    assert modules == {
        *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
        *(f"transformer_blocks.{i}.img_mlp.net.{j}" for i in range(60) for j in ("0.proj", "2")),
        *(f"transformer_blocks.{i}.txt_mlp.net.{j}" for i in range(59) for j in ("0.proj", "2")),
    }


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (1, 1, 4, 1), (1, 2, 4, 1)])
def test_full_size_weights_are_split(sizes):
    """Transformer and text encoder take the share of a device and little more, however the mesh splits weights."""
    mesh = AbstractMesh(sizes, MESH_AXES)
    file = CONFIGS / "qwen-image" / "text_encoder" / "config.json"
    encoder = schema.parse(family.QWEN2_5_VL.config, read_json(file), str(file))
    sizes_of = ((family.QWEN_IMAGE, QWEN_IMAGE, 20_430_401_088), (family.QWEN2_5_VL, encoder, 7_070_619_136))
    for network, config, weights in sizes_of:
        state = nnx.state(network.abstract(config))
        assert count(state) == weights
        shares = jax.tree.map(
            lambda x, sharding: np.prod(sharding.shard_shape(x.shape)), state, state_shardings(mesh, state)
        )
        assert sum(jax.tree.leaves(shares)) < 1.01 * count(state) / np.prod(sizes)


def test_lora_of_an_export_is_recognised():
    """All targets, the last block's among them, follow from the names."""
    config = AdapterConfig(modes=2, rank=3, alpha=3.0, dropout=0.0, targets=("last_block.*.img_mlp.*", "img_in"))
    student = family.QWEN_IMAGE.student(TINY, config, jnp.float32)
    _, _, trained = split_model(student)
    tensors = export_tensors(AdapterTable(table), jax.tree.map(lambda x: jnp.zeros(x.shape), trained))
    assert "transformer_blocks.2.img_mlp.net.0.proj.lora_A.weight" in tensors
    rank, targets = AdapterTable(table).lora(tensors, linear_layers(student.backbone))
    assert rank == 3
    assert targets == ("img_in", "last_block.2.img_mlp.proj_in", "last_block.2.img_mlp.proj_out")


def test_export_is_loaded_by_diffusers_and_comes_back():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    state = random_state(TINY)
    model = diffusers.QwenImageTransformer2DModel(**dataclasses.asdict(TINY), out_channels=4)
    exported = export_tensors(table, state)
    model.load_state_dict({name: torch.from_numpy(tensor.copy()) for name, tensor in exported.items()}, strict=True)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    jax.tree.map(np.testing.assert_array_equal, import_tensors(table, tensors, abstract_state(TINY)), state)


def test_number_of_layers_must_be_as_the_config_says():
    tensors = export_tensors(table, random_state(TINY))
    with pytest.raises(UserError, match=r"32 left over \(transformer_blocks.2"):
        import_tensors(table, tensors, abstract_state(dataclasses.replace(TINY, num_layers=2)))
    with pytest.raises(UserError, match=r"32 missing \(transformer_blocks.3"):
        import_tensors(table, tensors, abstract_state(dataclasses.replace(TINY, num_layers=4)))
