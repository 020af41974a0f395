"""What a distillation run carries from step to step, and the step itself."""

# B batch, N tokens, C latent channels

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax import schema
from arcflow_jax.flow.distill import Distillation, distil, part_of, teacher_share
from arcflow_jax.networks.conditioning import Conditioning, Guided
from arcflow_jax.networks.layers import Remat
from arcflow_jax.parallel.mesh import batched, replicated, state_shardings
from arcflow_jax.schema import Power, TrainingSteps
from arcflow_jax.training.optimizer import OptimizerConfig, ema_decay, learning_rate_schedule, make_optimizer

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """The exponential moving average (EMA) of the adapter: see `ema_decay`. The defaults are the published ones."""

    start: TrainingSteps = 100
    power: Power = 8.0

    def __post_init__(self):
        schema.check(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skipped:
    """Training steps that were skipped because their loss, gradient or update was not finite."""

    total: jax.Array
    in_row: jax.Array  # up to the last one

    def after(self, finite: jax.Array) -> Skipped:
        """The counts after a training step that was, or was not, finite."""
        return Skipped(self.total + ~finite, jnp.where(finite, 0, self.in_row + 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes. The frozen base model is not in it."""

    step: jax.Array  # training steps done
    adapter: nnx.State
    ema: nnx.State
    opt_state: optax.OptState
    skipped: Skipped

    def moved(self, move: Callable[[Any], Any]) -> TrainState:
        """The same, with EMA weights and optimizer state moved, which only the update needs."""
        return dataclasses.replace(self, ema=move(self.ema), opt_state=move(self.opt_state))

    @classmethod
    def create(cls, adapter: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first training step."""
        step, total, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # three arrays, because each is donated
        ema = jax.tree.map(jnp.copy, adapter)
        return cls(step, adapter, ema, optimizer.init(adapter), Skipped(total, in_row))

    def items(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "step": self.step,
            "adapter": self.adapter,
            "ema": self.ema,
            "optimizer": self.opt_state,
            "skipped": dataclasses.asdict(self.skipped),
        }

    @classmethod
    def from_items(cls, items: dict[str, Any]) -> TrainState:
        """The inverse of `items`."""
        skipped = Skipped(**items["skipped"])
        return cls(items["step"], items["adapter"], items["ema"], items["optimizer"], skipped)

    @property
    def updates(self) -> jax.Array:
        """Training steps that were not skipped: warm-up and the EMA count these."""
        return self.step - self.skipped.total


OF_GRADIENT = ("graphdef", "settings", "guidance", "steady", "mesh", "accumulate", "remat")
OF_UPDATE = ("optimizer", "ema", "mesh")


@functools.partial(jax.jit, static_argnames=OF_GRADIENT)
def gradient(
    step: jax.Array,
    adapter: nnx.State,
    base: nnx.State,
    conditioning: Conditioning,
    key: jax.Array,
    negative: Conditioning | None = None,
    latents: jax.Array | None = None,
    *,
    graphdef: nnx.GraphDef,
    settings: Distillation,
    guidance: float,
    steady: bool,
    mesh: Mesh,
    accumulate: int,
    remat: Remat,
) -> tuple[nnx.State, dict[str, jax.Array]]:
    """The first part of `train_step`: the gradient of training step `step`, and a log of it."""
    noise_key, loss_key = jax.random.split(jax.random.fold_in(key, step))
    batch, tokens = conditioning.batch_size, conditioning.positions.shape[0]
    share = None if steady else teacher_share(step, settings)
    shardings = state_shardings(mesh, adapter)
    model = nnx.merge(graphdef, base, adapter)
    noise = jax.random.normal(noise_key, (batch, tokens, model.backbone.config.in_channels))
    noise = jax.lax.with_sharding_constraint(noise, batched(mesh))

    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def add_gradient(total: nnx.State | None, index: jax.Array | int) -> tuple[nnx.State, Any]:
        """The total with a micro-batch's gradient; and the micro-batch's loss and log."""

        def rows(path: Any, x: jax.Array) -> jax.Array:
            if accumulate == 1 or path[-1] == jax.tree_util.GetAttrKey("positions"):  # which the batch shares
                return x
            return jax.lax.with_sharding_constraint(part_of(x, index, accumulate), batched(mesh))

        inputs = (conditioning, negative, noise, latents)
        prompts, negatives, start, images = jax.tree.map_with_path(rows, inputs)
        teachers = prompts if negatives is None else Guided(prompts, negatives, guidance)

        def student(adapter, x, sigma, dropout_key):
            # So that the gradient is sharded as the adapter is, where it arises
            adapter = jax.lax.with_sharding_constraint(adapter, shardings)
            return nnx.merge(graphdef, base, adapter).student_curve(x, sigma, prompts, dropout_key, remat)

        def teacher(x, sigma):
            times = len(x) // len(start)
            calls = teacher_calls(times, len(start) // shards)
            repeated = teachers.repeat(times // calls)
            return in_parts(lambda x, sigma: model.teacher_velocity(x, sigma, repeated), calls, len(start), x, sigma)

        options = {"settings": settings, "teacher_share": share, "latents": images}
        loss, total, log = distil(
            student, adapter, teacher, start, loss_key, part=(index, accumulate), total=total, **options
        )
        return total, (loss, log)

    if accumulate == 1:
        grads, (loss, log) = add_gradient(None, 0)
    else:
        zeros = jax.tree.map(jnp.zeros_like, adapter)
        total, logs = jax.lax.scan(add_gradient, zeros, jnp.arange(accumulate))
        grads = jax.tree.map(lambda x: x / accumulate, total)
        loss, log = jax.tree.map(lambda x: x.mean(0), logs)
    share = jnp.zeros(()) if steady else share
    log = {**log, "segment_loss": log["loss"], "loss": loss, "teacher_share": share}
    return on_mesh(mesh, grads, log)


@functools.partial(jax.jit, static_argnames=OF_UPDATE, donate_argnames="state")
def update(
    state: TrainState,
    grads: nnx.State,
    log: dict[str, jax.Array],
    *,
    optimizer: OptimizerConfig,
    ema: EmaConfig,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The second part of `train_step`: the state after the step, and the whole log. `state` is donated."""

    def updated(state: TrainState, grads: nnx.State) -> tuple[nnx.State, optax.OptState]:
        updates, opt_state = make_optimizer(optimizer, state.adapter).update(grads, state.opt_state, state.adapter)
        return optax.apply_updates(state.adapter, updates), opt_state

    norm = optax.global_norm(grads)
    finite = all_finite((log["loss"], norm, updated(state, grads)))
    # Computed again: to hold the update until all of it is known to be finite would take its memory
    state, grads, finite = jax.lax.optimization_barrier((state, grads, finite))
    adapter, opt_state = updated(state, grads)
    decay = ema_decay(state.updates, ema.start, ema.power)
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, adapter)
    adapter, average, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (adapter, average, opt_state),
        (state.adapter, state.ema, state.opt_state),
    )
    skipped = state.skipped.after(finite)
    log = {
        **log,
        "gradient_norm": norm,
        "learning_rate": learning_rate_schedule(optimizer)(state.updates),
        "skipped": skipped.total,
        "skipped_in_row": skipped.in_row,
    }
    return on_mesh(mesh, TrainState(state.step + 1, adapter, average, opt_state, skipped), log)


def on_mesh(mesh: Mesh, state: T, log: dict[str, jax.Array]) -> tuple[T, dict[str, jax.Array]]:
    """What a step returns, where it belongs: every process reads the log."""
    whole = jax.tree.map(lambda _: replicated(mesh), log)
    return jax.lax.with_sharding_constraint((state, log), (state_shardings(mesh, state), whole))


@functools.partial(jax.jit, static_argnames=sorted({*OF_GRADIENT, *OF_UPDATE}), donate_argnames="state")
def train_step(
    state: TrainState,
    base: nnx.State,
    conditioning: Conditioning,
    key: jax.Array,
    negative: Conditioning | None = None,
    latents: jax.Array | None = None,
    *,
    graphdef: nnx.GraphDef,
    settings: Distillation,
    guidance: float,
    optimizer: OptimizerConfig,
    ema: EmaConfig,
    steady: bool,
    mesh: Mesh,
    accumulate: int = 1,
    remat: Remat = "full",
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One training step of distillation on the prompts of `conditioning`, batch first.

    Jitted: its keyword arguments are static, and `state` is donated. If the loss, its gradient, the updated adapter or
    the optimizer state is not finite, the step is skipped: it counts, and changes nothing else.

    Args:
      base: the teacher's weights, frozen.
      key: of the run. The step folds its number into it, so that a resumed run draws the same numbers.
      negative: conditioning of the negative prompt, with the same batch size, if the teacher guidance is "cfg".
      latents: of real images [B, N, 4C], one a prompt; without them the step starts from noise.
      settings, optimizer, ema: of the recipe.
      guidance: scale of "cfg".
      mesh: that batch and state are sharded over.
      steady: whether the teacher's share has reached zero, so that its calls are batched (see `distill`).
      accumulate: micro-batches that the batch is computed in, one after another. Each has every `accumulate`-th
        example, and memory is that of one. Loss, gradient and update are those of the whole batch to rounding, except
        that dropout draws other numbers. The logged velocity error is the mean of the micro-batches' errors.
      remat: what the backward pass computes again (see `layers.Remat`).

    Returns:
      The next state, and what to log: loss, loss and velocity error of each segment, gradient norm, learning rate,
      teacher share, and how many training steps were skipped: in all, and in a row up to this one.
    """
    inputs = (state.step, state.adapter, base, conditioning, key, negative, latents)
    network = {"graphdef": graphdef, "settings": settings, "guidance": guidance, "remat": remat}
    grads, log = gradient(*inputs, **network, steady=steady, mesh=mesh, accumulate=accumulate)
    return update(state, grads, log, optimizer=optimizer, ema=ema, mesh=mesh)


def teacher_calls(states: int, examples: int) -> int:
    """The number of parts in which the teacher evaluates so many states of each of a device's examples.

    A device then has in one part as many states as it has examples, so that the teacher takes no more memory than the
    student; but all states of an example, because each part gathers the weights of sharded layers again.
    """
    return max(parts for parts in range(1, states + 1) if states % parts == 0 and parts <= max(1, examples))


def in_parts(
    call: Callable[..., jax.Array], parts: int, batch: int, *arrays: jax.Array
) -> jax.Array:  # [m·B, …] each -> [m·B, …]
    """call(*arrays) in several parts, one after the other, each with its share of the m rows of every example."""
    if parts == 1:
        return call(*arrays)

    def split(x: jax.Array) -> jax.Array:  # [m·B, …] -> [parts, m / parts · B, …]
        return jnp.moveaxis(x.reshape(batch, parts, -1, *x.shape[1:]), 1, 0).reshape(parts, -1, *x.shape[1:])

    out = jax.lax.map(lambda each: call(*each), tuple(split(x) for x in arrays))
    return jnp.moveaxis(out.reshape(parts, batch, -1, *out.shape[2:]), 0, 1).reshape(-1, *out.shape[2:])


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of a tree is NaN or infinite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
