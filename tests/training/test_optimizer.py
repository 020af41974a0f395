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
    """Adam after the first update only sees ratios of gradients: those of a clipped one are 1/norm times as large."""
    state = adapter()
    size = sum(x.size for x in jax.tree.leaves(state))  # 10 entries: gradients of ones have norm √10

    def first_moments(clip_from: int, scale: float) -> list[float]:
        optimizer = optim.make_optimizer(dataclasses.replace(CONFIG, clip_from=clip_from, b1=0.0), state)
        grads = jax.tree.map(lambda x: scale * jnp.ones_like(x), state)
        inner, seen = optimizer.init(state), []
        for _ in range(3):
            _, inner = optimizer.update(grads, inner, state)
            # With b1 = 0, Adam's first moment is the gradient that reaches it
            (moments,) = (part.mu for part in inner if isinstance(part, optax.ScaleByAdamState))
            seen.append(float(optax.global_norm(moments)))
        return seen

    norm = size**0.5
    np.testing.assert_allclose(first_moments(2, 1.0), [norm, norm, 1.0], rtol=1e-6)
    np.testing.assert_allclose(first_moments(0, 0.1), [0.1 * norm] * 3, rtol=1e-6)  # below the limit of 1


def rates(steps: tuple[int, ...], **changes: float) -> list[float]:
    schedule = optim.learning_rate_schedule(dataclasses.replace(CONFIG, **changes))
    return [float(schedule(jnp.asarray(step))) for step in steps]


def test_published_warm_up():
    """lr · (0.001 + 0.999 · i / warmup) for i < warmup, then lr; here lr is 1e-4 and warmup 100."""
    expected = [
        1e-7,  # i = 0: 1e-4 · 0.001
        1.0990e-6,  # i = 1: 1e-4 · (0.001 + 0.00999)
        5.0050e-5,  # i = 50: 1e-4 · (0.001 + 0.4995)
        9.9001e-5,  # i = 99: 1e-4 · (0.001 + 0.98901)
        1e-4,
        1e-4,
    ]
    np.testing.assert_allclose(rates((0, 1, 50, 99, 100, 9999), learning_rate=1e-4, warmup=100), expected, rtol=1e-5)


def test_learning_rate_without_warm_up_and_with_decay():
    np.testing.assert_allclose(rates((0, 1, 500)), [0.1] * 3, rtol=1e-6)
    # From step 20 to step 100 half a cosine: a quarter of it is at step 40, half at 60
    decayed = rates((0, 10, 20, 40, 60, 100, 120), warmup=20, decay_steps=100)
    quarter = 0.1 * (1 + 0.5**0.5) / 2
    np.testing.assert_allclose(decayed, [1e-4, 0.1 * 0.5005, 0.1, quarter, 0.05, 0, 0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": -1}, "warmup is -1, but has to be a whole number from 0 to "),
        ({"clip_norm": 0.0}, "clip_norm is 0.0, but has to be a number above 0 and at most "),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_ema_copies_at_first_and_then_averages_over_a_share_of_the_run():
    """(1 − 1/t)^8 with t = i + 1 − 100 for t ≥ 1, and a copy before: t is 1, 2, 3, 10 at i = 100, 101, 102, 109."""
    decays = [float(optim.ema_decay(jnp.asarray(i), start=100, power=8.0)) for i in (0, 99, 100, 101, 102, 109)]
    by_hand = [0, 0, 0, 1 / 256, 256 / 6561, 0.43046721]  # 0.5^8, (2/3)^8, 0.9^8
    np.testing.assert_allclose(decays, by_hand, rtol=1e-5)


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
