"""The published optimizer: AdamW with warm-up, per-group learning rates and clipping that starts late; and the EMA."""

from __future__ import annotations

import dataclasses
import fnmatch

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from arcflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW.

    Attributes:
      learning_rate: after warm-up.
      warmup: steps of linear warm-up from 0.
      decay_steps: with a positive number, the rate falls along a cosine to 0 at that step; 0 keeps it constant.
      b1, b2, weight_decay: of AdamW.
      clip_norm: global gradient norm to clip at, from step `clip_from` on.
      groups: ((pattern, factor), …): variables whose dotted path matches learn at factor × learning_rate. The first
        match counts.
    """

    learning_rate: float
    warmup: int
    decay_steps: int
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float
    clip_from: int
    groups: tuple[tuple[str, float], ...]


def learning_rate(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """The learning rate of a step counted from 0, before group factors."""
    warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup))
    if not config.decay_steps:
        return config.learning_rate * warm
    progress = jnp.clip(step / config.decay_steps, 0.0, 1.0)
    return config.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def clip_late(norm: float, start: int) -> optax.GradientTransformation:
    """Clips the global norm of the gradients at `norm` once `start` steps have passed."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, norm / jnp.maximum(optax.global_norm(updates), 1e-12))
        factor = jnp.where(state.count >= start, factor, 1.0)
        return jax.tree.map(lambda g: g * factor, updates), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def make_optimizer(config: OptimizerConfig, adapter: nnx.State) -> optax.GradientTransformation:
    """The optimizer of an adapter's variables.

    Raises:
      UserError: a group that matches no variable.
    """
    paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(adapter)}
    for pattern, _ in config.groups:
        if not fnmatch.filter(paths, pattern):
            raise UserError(f"optimizer group {pattern!r} matches no trainable variable; there are {', '.join(paths)}")

    def factor(path: tuple) -> float:
        name = ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        for pattern, value in config.groups:
            if fnmatch.fnmatchcase(name, pattern):
                return value
        return 1.0

    def scale_groups(updates, params=None):
        del params
        return jax.tree_util.tree_map_with_path(lambda path, u: u * factor(path), updates)

    return optax.chain(
        clip_late(config.clip_norm, config.clip_from),
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay),
        optax.stateless(scale_groups),
        optax.scale_by_learning_rate(lambda step: learning_rate(config, step)),
    )


def ema_decay(step: jax.Array, start: int, power: float) -> jax.Array:
    """Decay of the moving average after step t = step + 1: (1 − 1/t)^power, and 0 (a copy) up to `start`.

    The power-function EMA of Karras et al. 2024 (arXiv 2312.02696), whose width is a share of the run.
    """
    t = step + 1.0
    return jnp.where(t <= start, 0.0, (1 - 1 / t) ** power)
