"""What a distillation run carries from step to step, and the step itself."""

# B batch, N tokens, C latent channels

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from arcflow_jax import optim
from arcflow_jax.distill import Distillation, distillation_loss, teacher_share


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """The moving average of the adapter: see `optim.ema_decay`."""

    start: int
    power: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skipped:
    """Iterations that were without effect, because their loss or gradient was not finite."""

    total: jax.Array
    in_row: jax.Array  # the last ones, up to now

    def after(self, finite: jax.Array) -> Skipped:
        """The counts after an iteration that was, or was not, finite."""
        return Skipped(self.total + ~finite, jnp.where(finite, 0, self.in_row + 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; the frozen base is not in it."""

    step: jax.Array  # iterations done
    adapter: nnx.State
    ema: nnx.State
    opt_state: optax.OptState
    skipped: Skipped

    @classmethod
    def create(cls, adapter: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
        step, total, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # each its own, to be donated
        average = jax.tree.map(jnp.copy, adapter)
        return cls(step, adapter, average, optimizer.init(adapter), Skipped(total, in_row))

    @property
    def updates(self) -> jax.Array:
        """Iterations that had an effect: what warm-up and the average's width count in."""
        return self.step - self.skipped.total


def train_step(
    state: TrainState,
    base: nnx.State,
    conditioning: Any,
    key: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    settings: Distillation,
    optimizer: optax.GradientTransformation,
    optimizer_config: optim.OptimizerConfig,
    ema: EmaConfig,
    steady: bool,
    sharding: jax.sharding.NamedSharding,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One iteration of data-free distillation on the prompts of `conditioning`, batch first.

    If the loss or its gradient is not finite, the iteration is skipped: it counts, and changes nothing else.

    Args:
      base: the teacher's weights.
      key: of the run; the step's own is folded from it, so that a resumed run draws the same numbers.
      sharding: of the batch over the mesh.
      steady: whether the teacher's share has reached zero, which batches its calls (see `distill`). Static.

    Returns:
      The next state, and what to log: loss, loss and velocity error a segment, gradient norm, learning rate, teacher
      share, and how many iterations were skipped, in all and the last ones in a row.
    """
    noise_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
    batch, tokens = conditioning.batch_size, conditioning.positions.shape[0]
    share = None if steady else teacher_share(state.step, settings.decay)

    def loss_of(adapter: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graphdef, base, adapter)
        noise = jax.random.normal(noise_key, (batch, tokens, model.trunk.config.in_channels))
        noise = jax.lax.with_sharding_constraint(noise, sharding)

        def student(x, sigma, dropout_key):
            return model.student_mixture(x, sigma, conditioning, dropout_key)

        def teacher(x, sigma):
            return model.teacher_velocity(x, sigma, conditioning.repeat(len(x) // batch))

        return distillation_loss(student, teacher, noise, loss_key, settings=settings, share=share)

    (loss, log), grads = jax.value_and_grad(loss_of, has_aux=True)(state.adapter)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.adapter)
    adapter = optax.apply_updates(state.adapter, updates)
    decay = optim.ema_decay(state.updates, ema.start, ema.power)
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, adapter)
    adapter, average, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (adapter, average, opt_state),
        (state.adapter, state.ema, state.opt_state),
    )
    skipped = state.skipped.after(finite)
    log = {
        "loss": loss,
        "segment_loss": log["loss"],
        "velocity_error": log["velocity_error"],
        "gradient_norm": norm,
        "learning_rate": optim.learning_rate(optimizer_config, state.updates),
        "teacher_share": jnp.zeros(()) if steady else share,
        "skipped": skipped.total,
        "skipped_in_row": skipped.in_row,
    }
    return TrainState(state.step + 1, adapter, average, opt_state, skipped), log
