"""The published optimizer, AdamW with warm-up, group learning rates and late clipping; and the EMA."""

from __future__ import annotations

import dataclasses
import fnmatch

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from arcflow_jax import schema
from arcflow_jax.errors import UserError
from arcflow_jax.schema import Norm, Rate, Share, TrainingSteps, Weight

WARMUP_START = 0.001  # the first learning rate, as a share of the full one: the start_factor of the authors' LinearLR


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW. The defaults are the published ones, `groups` excepted, which depend on the student's head.

    Attributes:
      learning_rate: after warm-up.
      warmup: training steps of linear warm-up (see `learning_rate_schedule`).
      decay_steps: with a positive number, the rate falls after warm-up along a cosine to 0 at that training step; 0
        keeps it constant.
      b1, b2, weight_decay: of AdamW.
      clip_norm: global gradient norm to clip at, from training step `clip_from` on, counted from 0.
      groups: ((pattern, factor), …): variables whose dotted path matches learn at factor × learning_rate. The first
        match counts.
    """

    learning_rate: Rate = 1e-4
    warmup: TrainingSteps = 100
    decay_steps: TrainingSteps = 0
    b1: Share = 0.9
    b2: Share = 0.95
    weight_decay: Rate = 0.0
    clip_norm: Norm = 50.0
    clip_from: TrainingSteps = 100
    groups: tuple[tuple[str, Weight], ...] = ()

    def __post_init__(self):
        schema.check(self)


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of training step i, counted from 0, before group factors.

    lr · (0.001 + 0.999 · i / warmup) for i < warmup, as in the authors' code; then lr, or a cosine from lr to 0.
    """
    peak = config.learning_rate
    warm_up = optax.linear_schedule(WARMUP_START * peak, peak, max(1, config.warmup))
    after = optax.constant_schedule(peak)
    if config.decay_steps:
        after = optax.cosine_decay_schedule(peak, max(1, config.decay_steps - config.warmup))
    return optax.join_schedules([warm_up, after], [config.warmup])


def make_optimizer(config: OptimizerConfig, adapter: nnx.State) -> optax.GradientTransformation:
    """The optimizer of an adapter's variables.

    Raises:
      UserError: if a group matches no variable.
    """
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(adapter)]
    for pattern, _ in config.groups:
        if not fnmatch.filter(paths, pattern):
            raise UserError(f"optimizer group {pattern!r} matches no trainable variable; there are {', '.join(paths)}")

    def factor(path: tuple) -> float:
        name = ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        return next((value for pattern, value in config.groups if fnmatch.fnmatchcase(name, pattern)), 1.0)

    def factors(variables: nnx.State) -> nnx.State:
        return jax.tree_util.tree_map_with_path(lambda path, _: factor(path), variables)

    scales = {value: optax.scale(value) for value in {1.0, *(value for _, value in config.groups)}}
    return optax.chain(
        optax.conditionally_transform(
            optax.clip_by_global_norm(config.clip_norm), lambda step: step >= config.clip_from
        ),
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay),
        optax.partition(scales, factors),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )


def ema_decay(step: jax.Array, start: int, power: float) -> jax.Array:
    """Decay of the EMA after training step i = `step`, counted from 0: (1 − 1/t)^power with t = i + 1 − start.

    For t ≤ 1 it is 0: the EMA is a copy. The power-function EMA of Karras et al. 2024 (arXiv 2312.02696), whose width
    is a share of the steps since `start`.
    """
    t = jnp.maximum(step + 1.0 - start, 1.0)
    return (1 - 1 / t) ** power
