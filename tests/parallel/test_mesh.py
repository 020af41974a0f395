"""The mesh, its errors, and the shardings of a full-size run: no large array is whole on a device."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.mesh import AbstractDevice  # no public name makes one
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from arcflow_jax.compile_report.programs import open_model
from arcflow_jax.errors import UserError
from arcflow_jax.families.flux import CLIP, T5
from arcflow_jax.networks.student import split_model
from arcflow_jax.networks.text.clip import CLIPTextConfig
from arcflow_jax.networks.text.t5 import T5Config
from arcflow_jax.parallel.mesh import (
    MESH_AXES,
    Sizes,
    auto_sizes,
    check_batch,
    constrain,
    make_mesh,
    parse_mesh,
    partition_spec,
    state_shardings,
)
from arcflow_jax.training.optimizer import make_optimizer
from arcflow_jax.training.recipe import Recipe, read_config
from arcflow_jax.training.state import TrainState

ROOT = Path(__file__).parents[2]
MIB = 2**20
T5_XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
CLIP_L = CLIPTextConfig(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)


def flux() -> dict[str, object]:
    """The state of a run of FLUX.1-dev, as shapes."""
    recipe = Recipe.from_config(read_config(str(ROOT / "configs" / "flux.py")))
    student = open_model(ROOT / "configs" / "flux.1-dev").student(recipe.adapter, jnp.bfloat16)
    _, base, adapter = split_model(student)
    optimizer = make_optimizer(recipe.optimizer, adapter)
    state = jax.eval_shape(functools.partial(TrainState.create, optimizer=optimizer), adapter)
    return {"base": base, "adapter": state.adapter, "ema": state.ema, "optimizer": state.opt_state}


def sizes(state: object, mesh: AbstractMesh) -> list[tuple[int, int]]:
    """Bytes of each array, whole and on one device."""

    shardings = jax.tree.leaves(state_shardings(mesh, state))
    return [
        (x.size * x.dtype.itemsize, math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize)
        for x, sharding in zip(jax.tree.leaves(state), shardings, strict=True)
    ]


@pytest.mark.parametrize("mesh", [(1, 4, 1, 1), (16, 4, 1, 1), (4, 8, 1, 1), (1, 2, 2, 1)])
def test_everything_large_is_sharded(mesh):
    """Over fsdp, to a hundredth of the whole. Tensor shards most of it further."""
    mesh = AbstractMesh(mesh, MESH_AXES)
    parts = mesh.shape["fsdp"]
    encoders = {
        "T5-XXL": nnx.state(T5.abstract(T5_XXL, jnp.bfloat16)),
        "CLIP-L": nnx.state(CLIP.abstract(CLIP_L, jnp.bfloat16)),
    }
    for name, state in (flux() | encoders).items():
        found = sizes(state, mesh)
        for whole, part in found:
            assert part * parts <= whole or whole < MIB, (name, whole)
        whole, part = (sum(column) for column in zip(*found, strict=True))
        assert part < 1.01 * whole / parts, name


@pytest.mark.parametrize("mesh", [(1, 2, 2, 1), (1, 2, 4, 1), (1, 1, 8, 1)])
def test_tensor_shards_the_base_model(mesh):
    """Twice as many tensor devices leave about half of the base model on each; only small arrays are replicated."""
    state = flux()["base"]
    found = sizes(state, AbstractMesh(mesh, MESH_AXES))
    whole, part = (sum(column) for column in zip(*found, strict=True))
    assert part < 1.02 * whole / math.prod(mesh)


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        (
            (2, 8, 1, 1),
            8,
            "mesh data=2, fsdp=8 needs 16 devices, but 8 devices are visible; use fsdp=4, or",
        ),
        (
            (1, 1, 3, 1),
            1,
            "mesh tensor=3 needs 3 devices, but 1 device is visible; use tensor=1, or",
        ),
        ((2, 1, 1, 1), 8, "mesh data=2 needs 2 devices, but 8 devices are visible; use fsdp=4, or start on 2"),
        ((3, 1, 3, 1), 8, "mesh data=3, tensor=3 needs 9 devices, but 8 devices are visible; use fsdp=8 alone, or"),
        ((1, 0, 1, 1), 8, "mesh fsdp=0: a size has to be at least 1, and only one may be -1"),
        ((-1, -1, 1, 1), 8, "mesh data=-1, fsdp=-1: a size has to be at least 1, and only one may be -1"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_does(sizes, devices, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes, jax.devices() * devices)


def shared_out(sizes: Sizes) -> int:
    """Bytes on a device of a model of 1 GiB."""
    return 2**30 // (sizes[1] * sizes[2])


@pytest.mark.parametrize(
    ("devices", "batch", "expected"),
    [
        (1, 16, (1, 1, 1, 1)),
        (8, 16, (1, 8, 1, 1)),
        (16, 16, (1, 16, 1, 1)),
        (32, 16, (1, 16, 2, 1)),  # tensor takes what the batch cannot
        (256, 16, (1, 16, 8, 2)),  # and sequence what the 24 heads cannot
        (256, 256, (1, 256, 1, 1)),
        (8, 4, (1, 4, 2, 1)),
        (8, 6, (1, 2, 4, 1)),
        (6, 16, (1, 2, 3, 1)),
        (5, 16, (1, 1, 1, 5)),
    ],
)
def test_auto_mesh_of_a_fast_network(devices, batch, expected):
    assert auto_sizes(devices, batch, 24, shared_out) == expected
    assert auto_sizes(devices, batch, 24, shared_out, memory=1) == expected  # nothing holds more than this


@pytest.mark.parametrize(
    ("batch", "memory", "expected"),
    [
        (32, math.inf, (4, 8, 1, 1)),  # weights are gathered within a host
        (32, 2**30 // 8, (4, 8, 1, 1)),
        (32, 2**30 // 16, (2, 16, 1, 1)),  # but within as few as can hold them
        (32, 2**30 // 32, (1, 32, 1, 1)),
        (32, 1, (1, 32, 1, 1)),
        (16, math.inf, (4, 4, 2, 1)),
    ],
)
def test_auto_mesh_of_four_hosts(batch, memory, expected):
    assert auto_sizes(32, batch, 24, shared_out, memory=memory, islands=4) == expected


def test_auto_mesh_of_tpu_slices():
    assert auto_sizes(32, 32, 24, shared_out, memory=1, islands=4, slices=4) == (4, 8, 1, 1)
    assert auto_sizes(32, 8, 24, shared_out, islands=4, slices=4) == (4, 2, 4, 1)
    with pytest.raises(UserError, match=r"batch 6 does not divide by the 4 TPU slices, .*; use batch 8"):
        auto_sizes(32, 6, 24, shared_out, islands=4, slices=4)


def test_fsdp_is_no_larger_than_what_it_divides():
    """Beyond the rank of LoRA, a larger fsdp would leave more on each device."""

    def held(sizes: Sizes) -> int:
        return 100 if 224 % sizes[1] else 100 // sizes[1]

    assert auto_sizes(256, 256, 24, held) == (8, 32, 1, 1)


@pytest.mark.parametrize(
    ("batch", "micro_batches", "message"),
    [
        (12, 1, "batch 12 does not divide by data × fsdp = 8 of mesh data=2, fsdp=4; use batch 16, or mesh fsdp=4, "),
        (16, 4, "batch 16 does not divide by accumulate × data × fsdp = 32 of mesh data=2, fsdp=4; use batch 32, or"),
        (2, 4, "batch 2 does not divide by accumulate × data × fsdp = 32 of mesh data=2, fsdp=4; use batch 32, or"),
    ],
)
def test_a_batch_that_does_not_fit_the_mesh_says_what_does(batch, micro_batches, message):
    mesh = make_mesh((2, 4, 1, 1), jax.devices() * 8)
    with pytest.raises(UserError, match=re.escape(message)):
        check_batch(batch, mesh, 24, micro_batches)
    check_batch(32, mesh, 24, micro_batches)


@pytest.mark.parametrize(
    ("platform", "sequence", "pinned"), [("gpu", 1, True), ("tpu", 1, True), ("cpu", 1, False), ("cpu", 2, True)]
)
def test_activations_are_pinned_for_the_devices_of_the_mesh(platform, sequence, pinned):
    """Which are not those of this machine, where a program is compiled ahead of time."""
    device = AbstractDevice(device_kind="of no interest", num_cores=1, platform=platform)
    automatic = (AxisType.Auto,) * len(MESH_AXES)  # as of a real mesh; an abstract one is explicit from JAX 0.12 on
    mesh = AbstractMesh((2, 2, 1, sequence), MESH_AXES, axis_types=automatic, abstract_device=device)
    x = jax.ShapeDtypeStruct((8, 16, 4), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(lambda x: constrain(x, "batch", "tokens", None))(x).jaxpr
    constraints = [eqn.params["sharding"].spec for eqn in jaxpr.eqns if eqn.primitive.name == "sharding_constraint"]
    assert constraints == ([PartitionSpec(("data", "fsdp"), "sequence", None)] if pinned else [])


def test_without_a_mesh_nothing_is_pinned():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", None) is x


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor=2", "mesh tensor=2 needs 2 devices, but 1 device is visible; use tensor=1, or start on 2 devices"),
        ("heads=1", "'heads=1' is not AXIS=SIZE, where AXIS is one of data, fsdp, tensor, sequence"),
        ("tensor", "'tensor' is not AXIS=SIZE"),
        ("tensor=0", "'tensor=0' is not AXIS=SIZE"),
    ],
)
def test_a_written_mesh_that_does_not_fit(text, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text)


def test_mesh_of_one_device():
    for name in ("", "tensor=1", "sequence=-1"):
        assert parse_mesh(name).devices.ravel().tolist() == jax.devices()[:1]


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "heads"), (3072, 3072), ("fsdp", "tensor")),
        (("embed", "heads"), (38, 3072, 3072), (None, "fsdp", "tensor")),  # stacked layers stay whole
        (("embed", "heads"), (3071, 3072), (None, "tensor")),
        (("embed", "rank"), (3072, 256), ("fsdp", None)),  # an axis splits an array once
        (("batch", "tokens", None), (4, 4096, 64), (("data", "fsdp"), "sequence", None)),
        (("batch", "tokens", None), (2, 4225, 64), ("data", None, None)),  # as far as it divides
        (
            ("batch", None, "attending_heads", None),
            (4, 4608, 24, 128),
            (("data", "fsdp"), None, ("tensor", "sequence"), None),
        ),
        (("batch", None, "attending_heads", None), (1, 4608, 4, 128), (None, None, "tensor", None)),
    ],
)
def test_partition(axes, shape, spec):
    mesh = AbstractMesh((2, 2, 4, 2), MESH_AXES)
    assert partition_spec(mesh, axes, shape) == PartitionSpec(*spec)
