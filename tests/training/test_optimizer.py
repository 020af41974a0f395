"""The optimizer's rules, the moving average, and the mesh table."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from arcflow_jax.errors import UserError
from arcflow_jax.networks.layers import Adapter
from arcflow_jax.parallel.mesh import MESH_AXES, make_mesh, partition_spec
from arcflow_jax.training import optimizer as optim

CONFIG = optim.OptimizerConfig(
    learning_rate=0.1,
    warmup=0,
    decay_steps=0,
    b1=0.9,
    b2=0.95,
    weight_decay=0.0,
    clip_norm=1.0,
    clip_from=2,
    groups=(("momenta.*", 0.1),),
)


def adapter() -> nnx.State:
    return nnx.from_flat_state(
        [
            (("means", "kernel"), Adapter(jnp.ones((2, 3)), axes=(None, None))),
            (("momenta", "kernel"), Adapter(jnp.ones((2, 2)), axes=(None, None))),
        ]
    )


def one_update(config: optim.OptimizerConfig, scale: float = 1.0):
    state = adapter()
    optimizer = optim.make_optimizer(config, state)
    grads = jax.tree.map(lambda x: scale * jnp.ones_like(x), state)
    updates, _ = optimizer.update(grads, optimizer.init(state), state)
    return nnx.to_pure_dict(updates)


def test_group_learns_at_its_own_rate():
    updates = one_update(CONFIG)
    # Adam's first step is the learning rate in the gradient's direction
    np.testing.assert_allclose(updates["means"]["kernel"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["momenta"]["kernel"], -0.01, rtol=1e-5)


def test_group_that_matches_nothing_is_refused():
    config = dataclasses.replace(CONFIG, groups=(("head.momenta.*", 0.1),))
    with pytest.raises(UserError, match=r"'head\.momenta\.\*' matches no trainable variable"):
        optim.make_optimizer(config, adapter())


def test_first_matching_group_counts():
    config = dataclasses.replace(CONFIG, groups=(("momenta.*", 0.1), ("*", 0.5)))
    updates = one_update(config)
    np.testing.assert_allclose(updates["means"]["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_allclose(updates["momenta"]["kernel"], -0.01, rtol=1e-5)


def test_clipping_starts_late_and_keeps_small_gradients():
    clip = optim.clip_late(norm=1.0, start=2)
    grads = {"a": jnp.array([3.0, 4.0])}
    state = clip.init(grads)
    norms = []
    for _ in range(4):
        updates, state = clip.update(grads, state)
        norms.append(float(optax.global_norm(updates)))
    np.testing.assert_allclose(norms, [5, 5, 1, 1], rtol=1e-6)
    small, _ = clip.update({"a": jnp.array([0.3, 0.4])}, state)
    np.testing.assert_allclose(small["a"], [0.3, 0.4])


def test_learning_rate_warms_up_and_decays():
    config = dataclasses.replace(CONFIG, warmup=4, decay_steps=100)
    rates = [float(optim.learning_rate(config, jnp.asarray(step))) for step in (0, 1, 3, 50, 100, 120)]
    quarter, half, full = (0.1 * f * 0.5 * (1 + np.cos(np.pi * s / 100)) for f, s in ((0.25, 0), (0.5, 1), (1, 3)))
    np.testing.assert_allclose(rates, [quarter, half, full, 0.05, 0, 0], atol=1e-7)


def test_ema_copies_at_first_and_then_averages_over_a_share_of_the_run():
    decays = [float(optim.ema_decay(jnp.asarray(step), start=10, power=8.0)) for step in (0, 9, 10, 99, 9999)]
    np.testing.assert_allclose(decays, [0, 0, (10 / 11) ** 8, 0.99**8, 0.9999**8], rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh, which only arranges devices, asks of one."""

    id: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_mesh_fills_in_and_refuses_what_does_not_fit():
    devices = [Device(i) for i in range(8)]
    assert dict(make_mesh((-1, 2, 1, 1), devices).shape) == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    with pytest.raises(UserError, match="mesh data=3, fsdp=2 needs 6 devices, but 8 devices are visible"):
        make_mesh((3, 2, 1, 1), devices)


def test_partition_splits_what_divides_and_each_mesh_axis_once():
    mesh = AbstractMesh((1, 4, 2, 1), MESH_AXES)
    assert partition_spec(mesh, ("embed", "mlp"), (3, 8, 6)) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec(mesh, ("embed", "mlp"), (6, 6)) == PartitionSpec(None, "tensor")
    assert partition_spec(mesh, ("embed", "rank"), (8, 4)) == PartitionSpec("fsdp", None)
    assert partition_spec(mesh, ("rank", "mlp"), (4, 8)) == PartitionSpec("fsdp", "tensor")
    assert partition_spec(mesh, ("norm",), (8,)) == PartitionSpec(None)
