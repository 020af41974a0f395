"""Distillation: what the student is trained to do, as pure functions (arXiv 2602.09014).

A segment begins with one call of the student, which predicts a curve. A *mixed trajectory* then visits M states
of the segment, carried there partly by the student, in closed form, and partly by the teacher's own Euler steps.
At each of them the student's mean velocity from there on is matched to the teacher's velocity. The trajectory's
end starts the next segment. The trajectory and the targets are constants to the gradient: it reaches the student
through its curves only, one segment at a time.

The first segment begins in noise. Where there are real latents, each example is one segment, drawn by chance, that
begins in a latent with noise instead.

Student and teacher are callables; states and velocities are float32 here, whatever dtype the networks compute in.
"""

# B batch, N tokens, D features of a token, K modes, M visited states of a segment

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from arcflow_jax.errors import UserError
from arcflow_jax.flow.curve import Curve, Span
from arcflow_jax.flow.schedule import boundaries, sigma_of

Trained = TypeVar("Trained")
# (what is trained, states [B, N, D], σ [B], key of the dropout) -> curve
Student = Callable[[Trained, jax.Array, jax.Array, jax.Array], Curve]
# (states [m·B, N, D], σ [m·B]) -> velocity [m·B, N, D]. m is 1 or M: rows b·m … b·m + m − 1 belong to example b,
# so conditioning [B, …] has to be repeated m times, `jnp.repeat(c, m, axis=0)`.
Teacher = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The published recipe's numbers. Times are raw time, of which the whole trajectory is 1, unless said.

    Attributes:
      nfe: network calls of the generator, one a segment.
      shift: of the time warp.
      final_step_ratio: length of the last segment relative to the others.
      states: M, visited in each segment.
      window: how far past the teacher's step a velocity is averaged, in substeps.
      substeps: in one unit of raw time; what `window` counts in.
      mode_dropout: chance of a mode to be left out where the student carries the trajectory.
      decay: iterations over which the teacher's share of the trajectory falls from 1 to 0.
      loss_scale: the loss is loss_scale · ½ · mean square.
      state_weight: of a second term, ½ · mean square of the integrated states less the teacher's (see `integrate`);
        0 leaves it out.
      data_weight: of flow matching (Lipman et al. 2023, arXiv 2210.02747) on real latents, ½ · mean square of the
        student's velocity where a segment starts less noise − latent; 0 leaves it out.
      teacher_guidance: "embedded", the scale is fed to the teacher's guidance embedding; or "cfg", true
        classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), with 1 for a guidance embedding.
      negative_prompt: that "cfg" guides away from.
    """

    nfe: int = 2
    shift: float = 3.2
    final_step_ratio: float = 1.0
    states: int = 4
    window: int = 3
    substeps: int = 128
    mode_dropout: float = 0.1
    decay: int = 2000
    loss_scale: float = 30.0
    state_weight: float = 0.0
    data_weight: float = 0.0
    teacher_guidance: str = "embedded"
    negative_prompt: str = ""

    def __post_init__(self):
        for name in ("nfe", "states", "substeps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be at least 1")
        for name in ("shift", "final_step_ratio"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be above 0")
        if not 0 <= self.mode_dropout < 1:
            raise UserError(f"mode_dropout is {self.mode_dropout}, but has to be at least 0 and below 1")
        for name in ("state_weight", "data_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be at least 0")
        if self.teacher_guidance not in ("embedded", "cfg"):
            raise UserError(f"teacher_guidance is {self.teacher_guidance!r}, but has to be 'embedded' or 'cfg'")

    def window_length(self, length: jax.Array) -> jax.Array:
        """The window in a segment of this length: whole substeps, evenly dividing the segment."""
        substep = length / jnp.maximum(jnp.round(length * self.substeps), 1)
        return jnp.minimum(self.window * substep, length)

    def span(self, start: jax.Array, length: jax.Array) -> Span:
        """The segment in σ."""
        return Span(sigma_of(start, self.shift), sigma_of(start - length, self.shift))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of one segment, all uniform in [0, 1)."""

    modes: jax.Array  # [B, K]: mode dropout
    student: jax.Array  # [B, M]: how the student's share of the segment is cut
    teacher: jax.Array  # [B, M - 1]: how the teacher's is

    @classmethod
    def draw(cls, key: jax.Array, batch: int, modes: int, states: int) -> Draws:
        modes_key, student_key, teacher_key = jax.random.split(key, 3)
        return cls(
            modes=jax.random.uniform(modes_key, (batch, modes)),
            student=jax.random.uniform(student_key, (batch, states)),
            teacher=jax.random.uniform(teacher_key, (batch, states - 1)),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """The M states that a mixed trajectory visits. From raw time `arrive` to `leave` the teacher carries it."""

    states: jax.Array  # [M, B, N, D], on arrival
    arrive: jax.Array  # [M, B]
    leave: jax.Array  # [M, B]
    targets: jax.Array  # [M, B, N, D]: the teacher's velocity on arrival
    end: jax.Array  # [B, N, D]: the state at the segment's end


def teacher_share(step: jax.Array | int, decay: int) -> jax.Array:
    """The teacher's share of the trajectory at an iteration counted from 0: from 1 down to 0 over `decay`."""
    return jnp.maximum(1 - step / decay, 0.0) if decay else jnp.zeros(())


def visit_times(
    draws: Draws, start: jax.Array, length: jax.Array, *, settings: Distillation, share: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Raw times of arriving at and leaving the M visited states, two of [M, B].

    Student and teacher take M turns each. The segment without its window is divided between them by `share`, the
    teacher's; the student's part is cut at M uniform points, the last of which leaves a rest for the segment's end,
    the teacher's part at M − 1.
    """
    free = length - settings.window_length(length)  # [B]
    student = jnp.sort(draws.student, -1)  # [B, M]
    teacher = jnp.pad(jnp.sort(draws.teacher, -1), ((0, 0), (1, 0)))  # [B, M]: from 0
    teacher = jnp.pad(teacher, ((0, 0), (0, 1)), constant_values=1.0)  # [B, M + 1]: to 1

    def at(teacher: jax.Array) -> jax.Array:
        travelled = free[:, None] * ((1 - share) * student + share * teacher)
        return jnp.maximum(start[:, None] - travelled, 0.0).T  # rounding must not carry it past the data

    return at(teacher[:, :-1]), at(teacher[:, 1:])


def visit(
    curve: Curve,
    teacher: Teacher,
    x: jax.Array,
    start: jax.Array,
    length: jax.Array,
    draws: Draws,
    *,
    settings: Distillation,
    share: jax.Array | None,
) -> Visits:
    """Follows the mixed trajectory from x [B, N, D] through one segment. Arguments as in `segment_loss`."""
    curve = jax.lax.stop_gradient(curve)
    if settings.mode_dropout:
        curve = curve.drop_modes(draws.modes, settings.mode_dropout)
    x = jax.lax.stop_gradient(x)
    arrive, leave = visit_times(draws, start, length, settings=settings, share=0.0 if share is None else share)
    span = settings.span(start, length)
    sigma_a, sigma_b = sigma_of(arrive, settings.shift), sigma_of(leave, settings.shift)

    def target(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(teacher(x, sigma).astype(x.dtype))

    def turn(carry, sigmas):
        x, sigma = carry
        sigma_a, sigma_b = sigmas
        state = x - curve.displacement(span, sigma, sigma_a)
        u = target(state, sigma_a)
        return (state + u * (sigma_b - sigma_a)[:, None, None], sigma_b), (state, u)

    if share is None:
        # No state depends on the teacher: all are known beforehand, and it reads them as one batch. An example's
        # states stay together in it, so that a batch sharded over devices stays where it is.
        states = x - jax.vmap(lambda sigma: curve.displacement(span, span.src, sigma))(sigma_a)
        batched = target(*(a.swapaxes(0, 1).reshape(-1, *a.shape[2:]) for a in (states, sigma_a)))
        targets = batched.reshape(-1, *states.shape[:1], *states.shape[2:]).swapaxes(0, 1)
        sigma = span.src
    else:
        # A loop, not M copies of the teacher in the compiled program.
        (x, sigma), (states, targets) = jax.lax.scan(turn, (x, span.src), (sigma_a, sigma_b))
    end = x - curve.displacement(span, sigma, span.end)
    return Visits(states=states, arrive=arrive, leave=leave, targets=targets, end=end)


def matched(visits: Visits, length: jax.Array, *, settings: Distillation) -> tuple[jax.Array, jax.Array]:  # [M, B] each
    """σ on arrival, and σ one window after leaving: between them the student is matched to the teacher.

    Over less than two substeps that is empty.
    """
    until = visits.leave - settings.window_length(length)
    short = jnp.round((visits.arrive - until) * settings.substeps) < 2
    sigma_a = sigma_of(visits.arrive, settings.shift)
    return sigma_a, jnp.where(short, sigma_a, sigma_of(until, settings.shift))


def predict(
    curve: Curve, visits: Visits, start: jax.Array, length: jax.Array, *, settings: Distillation
) -> jax.Array:  # [M, B, N, D]
    """What is matched to the targets: the student's mean velocity over `matched`, where that is empty its velocity."""
    span = settings.span(start, length)
    return jax.vmap(lambda a, b: curve.mean_velocity(span, a, b))(*matched(visits, length, settings=settings))


def integrate(
    curve: Curve, visits: Visits, x: jax.Array, start: jax.Array, length: jax.Array, *, settings: Distillation
) -> tuple[jax.Array, jax.Array]:  # [M, B, N, D] each
    """The states where `matched` ends: the student's, integrated from the segment's first state x, and the teacher's.

    The teacher's is the visited state, carried on by its velocity there.
    """
    span = settings.span(start, length)
    sigma_a, sigma_b = matched(visits, length, settings=settings)
    students = x - jax.vmap(lambda b: curve.displacement(span, span.src, b))(sigma_b)
    return students, visits.states + (sigma_b - sigma_a)[..., None, None] * visits.targets


def segment_loss(
    curve: Curve,
    teacher: Teacher,
    x: jax.Array,
    start: jax.Array,
    length: jax.Array,
    draws: Draws,
    *,
    settings: Distillation,
    share: jax.Array | None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The loss of one segment: loss_scale · ½ · mean square of predicted less target velocity, and the state term.

    Args:
      curve: what the student predicted at x; the gradient's only way to the student.
      x: the segment's first state [B, N, D].
      start, length: where the segment begins and how long it is, in raw time; [B] or scalars.
      share: the teacher's of the trajectory, traced (see `teacher_share`); None says that it
        is 0 from here on: the same loss, but the teacher is called once, on all states together.

    Returns:
      The loss; the detached state [B, N, D] at the segment's end; `loss` and `velocity_error`, the squared error
      of the velocities relative to the targets' square, to log.
    """
    x = jax.lax.stop_gradient(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    start, length = (jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1]) for t in (start, length))
    visits = visit(curve, teacher, x, start, length, draws, settings=settings, share=share)
    error = jnp.square(predict(curve, visits, start, length, settings=settings) - visits.targets).mean()
    loss = settings.loss_scale * 0.5 * error
    if settings.state_weight:
        students, teachers = integrate(curve, visits, x, start, length, settings=settings)
        loss += settings.state_weight * 0.5 * jnp.square(students - teachers).mean()
    log = {"loss": loss, "velocity_error": error / jnp.square(visits.targets).mean()}
    return loss, visits.end, jax.lax.stop_gradient(log)


def distil(
    student: Student,
    trained: Trained,
    teacher: Teacher,
    noise: jax.Array,
    key: jax.Array,
    *,
    settings: Distillation,
    share: jax.Array | None,
    latents: jax.Array | None = None,
) -> tuple[jax.Array, Trained, dict[str, jax.Array]]:
    """The loss of an iteration, its gradient by what is trained, and what to log.

    From noise [B, N, D], a whole few-step trajectory: the segments' losses, weighted by length. From real latents
    [B, N, D], with noise for each: one segment an example, drawn with a chance equal to its length.

    The gradient of a segment is taken where the segment is, and added up: the next one needs nothing of it, so the
    networks' activations are kept for one segment at a time.

    Args:
      share: as in `segment_loss`, of which also comes what to log, a row for each segment.
    """
    bounds = boundaries(settings.nfe, settings.final_step_ratio)
    lengths = bounds[:-1] - bounds[1:]
    noise = noise.astype(jnp.promote_types(noise.dtype, jnp.float32))

    def segment(trained, x, start, length, weight, key, straight=None):
        draw_key, dropout_key = jax.random.split(key)
        sigma = jnp.broadcast_to(sigma_of(start, settings.shift), x.shape[:1])
        curve = student(trained, x, sigma, dropout_key)
        draws = Draws.draw(draw_key, x.shape[0], curve.modes, settings.states)
        loss, end, log = segment_loss(curve, teacher, x, start, length, draws, settings=settings, share=share)
        if straight is not None and settings.data_weight:
            reconstruction = 0.5 * jnp.square(curve.velocity(settings.span(start, length), sigma) - straight).mean()
            loss += settings.data_weight * reconstruction
            log |= {"reconstruction": jax.lax.stop_gradient(reconstruction)}
        return weight * loss, (end, log)

    differentiated = jax.value_and_grad(segment, has_aux=True)
    if latents is not None:
        index_key, key = jax.random.split(key)
        index = jax.random.categorical(index_key, jnp.log(lengths), shape=noise.shape[:1])
        start, length = bounds[index], lengths[index]
        sigma = sigma_of(start, settings.shift)[:, None, None]
        x = (1 - sigma) * latents + sigma * noise
        (loss, (_, log)), gradient = differentiated(trained, x, start, length, 1.0, key, noise - latents)
        return loss, gradient, jax.tree.map(lambda value: value[None], log)

    def step(carry: tuple, inputs: tuple[jax.Array, ...]) -> tuple[tuple, tuple]:
        x, gradient = carry
        index, start, length = inputs
        (loss, (x, log)), part = differentiated(trained, x, start, length, length, jax.random.fold_in(key, index))
        return (x, jax.tree.map(jnp.add, gradient, part)), (loss, log)

    # A loop, so that the compiled program holds one copy of both networks however many segments there are.
    carry = (noise, jax.tree.map(jnp.zeros_like, trained))
    (_, gradient), (losses, logs) = jax.lax.scan(step, carry, (jnp.arange(settings.nfe), bounds[:-1], lengths))
    return losses.sum(), gradient, logs
