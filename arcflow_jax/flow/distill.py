"""Distillation: the student's training objective, as pure functions (arXiv 2602.09014).

A segment starts with one student evaluation, which predicts a curve. Then a *mixed trajectory* visits M states of the
segment. The student moves it in part, in closed form; the teacher moves it in part, in Euler steps. At each visited
state the student's mean velocity over what follows is matched to the teacher's velocity there. The end of the
trajectory starts the next segment. Trajectory and targets are constants for the gradient, which reaches the student
through its curves only, one segment at a time.

Data-free distillation starts the first segment in noise. With real latents, each example is a single random segment,
which starts in a noised latent.

Student and teacher are callables. States and velocities are float32 here, whatever dtype the networks compute in.
"""

# B batch, N tokens, D features of a token, K modes, M visited states of a segment

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import chex
import jax
import jax.numpy as jnp

from arcflow_jax import schema
from arcflow_jax.flow.curve import Curve, Span
from arcflow_jax.flow.schedule import boundaries, sigma_of
from arcflow_jax.schema import NFE, Count, Ratio, Share, Shift, States, TrainingSteps, Weight, Window

Params = TypeVar("Params")
# (trainable parameters, states [B, N, D], σ [B], dropout key) -> curve
Student = Callable[[Params, jax.Array, jax.Array, jax.Array], Curve]
# (states [m·B, N, D], σ [m·B]) -> velocity [m·B, N, D]. m is 1 or M: rows b·m … b·m + m − 1 belong to example b,
# so conditioning [B, …] has to be repeated m times, `jnp.repeat(c, m, axis=0)`.
Teacher = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The settings of the objective; the defaults are the published recipe. Lengths are in timesteps t ∈ [0, 1].

    Attributes:
      nfe: number of network evaluations of the student, one per segment.
      shift: the timestep shift.
      final_step_ratio: length of the last segment relative to the others.
      states: M, the number of visited states in each segment.
      cuts: how a mixed trajectory is cut (see `cut_points`): "sorted", the published way, or "stratified".
      window: how far past the teacher's Euler step the student's velocity is averaged, in substeps.
      substeps: number of substeps in t ∈ [0, 1]; the unit of `window`.
      mode_dropout: probability of dropping a mode where the student moves the mixed trajectory.
      decay: training steps in which the teacher's share of the mixed trajectory falls from 1 to 0, if nothing stops it.
      least_share: the value at which it stops falling; 0 is the published one.
      loss_scale: the loss is loss_scale · ½ · mean square.
      state_weight: weight of a second term, ½ · mean square of the integrated states less the teacher's (see
        `integrated_states`); 0 turns it off.
      data_weight: weight of flow matching (Lipman et al. 2023, arXiv 2210.02747) on real latents, ½ · mean square of
        the student's velocity at the start of the segment less (noise − latent); 0 turns it off.
      teacher_guidance: "embedded", where the guidance scale goes into the teacher's guidance embedding; or "cfg",
        classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), where any guidance embedding gets 1.
      negative_prompt: the negative prompt of "cfg".
    """

    nfe: NFE = 2
    shift: Shift = 3.2
    final_step_ratio: Ratio = 1.0
    states: States = 4
    cuts: Literal["sorted", "stratified"] = "sorted"
    window: Window = 3
    substeps: Count = 128
    mode_dropout: Share = 0.1
    decay: TrainingSteps = 2000
    least_share: Share = 0.0
    loss_scale: Weight = 30.0
    state_weight: Weight = 0.0
    data_weight: Weight = 0.0
    teacher_guidance: Literal["embedded", "cfg"] = "embedded"
    negative_prompt: str = ""

    def __post_init__(self):
        schema.check(self)

    def window_length(self, length: jax.Array) -> jax.Array:
        """The length of the window in a segment of length `length`, in whole substeps that divide the segment."""
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
    student: jax.Array  # [B, M]: where the student's share of the segment is cut
    teacher: jax.Array  # [B, M - 1]: where the teacher's share is cut

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
    """The M visited states of a mixed trajectory. From timestep `arrive` to `leave` the teacher moves it."""

    states: jax.Array  # [M, B, N, D], on arrival
    arrive: jax.Array  # [M, B]
    leave: jax.Array  # [M, B]
    targets: jax.Array  # [M, B, N, D]: the teacher's velocity on arrival
    end: jax.Array  # [B, N, D]: the state at the end of the segment


def teacher_share(step: jax.Array | int, settings: Distillation) -> jax.Array:
    """The teacher's share of the trajectory in a training step, counted from 0: max(1 − step / decay, least_share)."""
    falling = 1 - step / settings.decay if settings.decay else 0.0
    return jnp.maximum(falling, settings.least_share)


def cut_points(draws: Draws, cuts: str) -> tuple[jax.Array, jax.Array]:
    """Where the parts of student [B, M] and teacher [B, M − 1] are cut, rising in [0, 1).

    "sorted": all points are uniform in [0, 1). "stratified": the student's part has one uniform point in each of M
    equal cells, and the teacher's has one in each cell of the same length around 1/M, …, (M − 1)/M. All of the
    student's points together are still uniform, but they do not cluster. The teacher's moves are more equal: for large
    M, the sum of their squares is on average 7/6 of that of M equal moves; sorted, it is twice as large.
    """
    if cuts == "sorted":
        return jnp.sort(draws.student, -1), jnp.sort(draws.teacher, -1)
    states = draws.student.shape[-1]
    return (jnp.arange(states) + draws.student) / states, (jnp.arange(1, states) + draws.teacher - 0.5) / states


def visit_times(
    draws: Draws, start: jax.Array, length: jax.Array, *, settings: Distillation, teacher_share: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """The timesteps of arriving at and leaving the M visited states, two arrays [M, B].

    Student and teacher take M turns each. `teacher_share` divides the segment, without its window, between them. The
    student's part is cut at M points, and what is left after the last one goes to the end of the segment. The
    teacher's part is cut at M − 1 points.
    """
    free = length - settings.window_length(length)  # [B]
    student, teacher = cut_points(draws, settings.cuts)
    teacher = jnp.pad(teacher, ((0, 0), (1, 0)))  # [B, M]: from 0
    teacher = jnp.pad(teacher, ((0, 0), (0, 1)), constant_values=1.0)  # [B, M + 1]: to 1

    def timestep(teacher: jax.Array) -> jax.Array:  # [B, M] -> [M, B]
        travelled = free[:, None] * ((1 - teacher_share) * student + teacher_share * teacher)
        return jnp.maximum(start[:, None] - travelled, 0.0).T  # rounding must not carry it below 0

    return timestep(teacher[:, :-1]), timestep(teacher[:, 1:])


def visit(
    curve: Curve,
    teacher: Teacher,
    x: jax.Array,
    start: jax.Array,
    length: jax.Array,
    draws: Draws,
    *,
    settings: Distillation,
    teacher_share: jax.Array | None,
) -> Visits:
    """Follows the mixed trajectory from x [B, N, D] through one segment. Arguments as in `segment_loss`."""
    curve = jax.lax.stop_gradient(curve)
    if settings.mode_dropout:
        curve = curve.drop_modes(draws.modes, settings.mode_dropout)
    x = jax.lax.stop_gradient(x)
    share = 0.0 if teacher_share is None else teacher_share
    arrive, leave = visit_times(draws, start, length, settings=settings, teacher_share=share)
    span = settings.span(start, length)
    sigma_a, sigma_b = sigma_of(arrive, settings.shift), sigma_of(leave, settings.shift)

    def target(x: jax.Array, sigma: jax.Array) -> jax.Array:
        velocity = teacher(x, sigma)
        chex.assert_equal_shape([x, velocity])
        return jax.lax.stop_gradient(velocity.astype(x.dtype))

    def turn(carry, sigmas):
        x, sigma = carry
        sigma_a, sigma_b = sigmas
        state = x - curve.displacement(span, sigma, sigma_a)
        u = target(state, sigma_a)
        return (state + u * (sigma_b - sigma_a)[:, None, None], sigma_b), (state, u)

    if teacher_share is None:
        # No state depends on the teacher: all are known beforehand, and the teacher gets them as one batch. The states
        # of an example stay together in it, so a batch that is sharded over devices stays where it is.
        states = x - jax.vmap(lambda sigma: curve.displacement(span, span.src, sigma))(sigma_a)
        batched = target(*(a.swapaxes(0, 1).reshape(-1, *a.shape[2:]) for a in (states, sigma_a)))
        targets = batched.reshape(-1, *states.shape[:1], *states.shape[2:]).swapaxes(0, 1)
        sigma = span.src
    else:
        # A loop, so that the compiled program does not hold M copies of the teacher
        (x, sigma), (states, targets) = jax.lax.scan(turn, (x, span.src), (sigma_a, sigma_b))
    end = x - curve.displacement(span, sigma, span.end)
    return Visits(states=states, arrive=arrive, leave=leave, targets=targets, end=end)


def matched_span(visits: Visits, length: jax.Array, *, settings: Distillation) -> tuple[jax.Array, jax.Array]:
    """Where the student is matched to the teacher: from σ on arrival to σ one window after leaving, each [M, B].

    Where that is less than two substeps, the span is empty.
    """
    until = visits.leave - settings.window_length(length)
    short = jnp.round((visits.arrive - until) * settings.substeps) < 2
    sigma_a = sigma_of(visits.arrive, settings.shift)
    return sigma_a, jnp.where(short, sigma_a, sigma_of(until, settings.shift))


def predicted_velocity(
    curve: Curve, visits: Visits, start: jax.Array, length: jax.Array, *, settings: Distillation
) -> jax.Array:  # [M, B, N, D]
    """The student's mean velocity over `matched_span`, or its velocity where that span is empty."""
    span = settings.span(start, length)
    return jax.vmap(lambda a, b: curve.mean_velocity(span, a, b))(*matched_span(visits, length, settings=settings))


def integrated_states(
    curve: Curve, visits: Visits, x: jax.Array, start: jax.Array, length: jax.Array, *, settings: Distillation
) -> tuple[jax.Array, jax.Array]:  # [M, B, N, D] each
    """The student's and the teacher's states at the end of `matched_span`.

    The student's is integrated from x, the first state of the segment. The teacher's is the visited state, moved on by
    the teacher's velocity there.
    """
    span = settings.span(start, length)
    sigma_a, sigma_b = matched_span(visits, length, settings=settings)
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
    teacher_share: jax.Array | None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The loss of one segment: loss_scale · ½ · mean square of predicted less target velocity, and the state term.

    Args:
      curve: the student's prediction at x. The gradient reaches the student through it alone.
      teacher: see `Teacher`.
      x: the first state of the segment, [B, N, D].
      start, length: where the segment starts and its length, in timesteps t; [B] or scalars.
      draws: the random numbers of the segment.
      teacher_share: the teacher's share of the trajectory (see `teacher_share`), traced. None means that it is 0 from
        now on: the loss is the same, but the teacher is called once, on all states together.

    Returns:
      The loss; the detached state [B, N, D] at the end of the segment; and a log with `loss` and `velocity_error`, the
      squared error of the velocities relative to the square of the targets.
    """
    chex.assert_rank(x, 3)
    chex.assert_shape([draws.modes, draws.student], [(len(x), curve.modes), (len(x), settings.states)])
    x = jax.lax.stop_gradient(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    start, length = (jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1]) for t in (start, length))
    visits = visit(curve, teacher, x, start, length, draws, settings=settings, teacher_share=teacher_share)
    predicted = predicted_velocity(curve, visits, start, length, settings=settings)
    chex.assert_equal_shape([predicted, visits.targets])
    error = jnp.square(predicted - visits.targets).mean()
    loss = settings.loss_scale * 0.5 * error
    if settings.state_weight:
        students, teachers = integrated_states(curve, visits, x, start, length, settings=settings)
        loss += settings.state_weight * 0.5 * jnp.square(students - teachers).mean()
    log = {"loss": loss, "velocity_error": error / jnp.square(visits.targets).mean()}
    return loss, visits.end, jax.lax.stop_gradient(log)


def part_of(batch: jax.Array, index: jax.Array | int, parts: int) -> jax.Array:  # [B, …] -> [B / parts, …]
    """One of the equal parts of a batch: its rows index, index + parts, …

    Such a part has rows of every device that a sharded batch lies on, and taking it moves none.
    """
    rows = batch.reshape(len(batch) // parts, parts, *batch.shape[1:])
    return jax.lax.dynamic_index_in_dim(rows, index, 1, keepdims=False)


def distil(
    student: Student,
    params: Params,
    teacher: Teacher,
    noise: jax.Array,
    key: jax.Array,
    *,
    settings: Distillation,
    teacher_share: jax.Array | None,
    latents: jax.Array | None = None,
    part: tuple[jax.Array | int, int] = (0, 1),
    total: Params | None = None,
) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
    """The loss of one training step, its gradient with respect to `params`, and a log.

    Without latents: a whole few-step trajectory from noise. The loss is the sum of the segments' losses, weighted by
    their lengths. With latents: one segment per example, drawn with a probability equal to its length.

    The gradient is taken segment by segment and summed: the next segment does not depend on it, so the networks'
    activations are kept for one segment at a time.

    Args:
      student, teacher: see `Student` and `Teacher`.
      params: the student's trainable parameters, a pytree.
      noise: standard normal, [B, N, D].
      key: of all random draws in this training step.
      teacher_share: see `segment_loss`.
      latents: real latents [B, N, D], or None for data-free distillation.
      part: which part of a larger batch these B examples are (see `part_of`), as (index, number of parts). They get the
        numbers that they would get in that batch; the student's dropout key is another in each part.
      total: the sum of the other parts' gradients so far, to which this one is added; None for nothing.

    Returns:
      The loss; the gradient plus `total`, like `params`; and the log of `segment_loss`, with a leading axis of
      segments. With `data_weight` it also has `reconstruction`, the flow-matching term.
    """
    chex.assert_rank(noise, 3)
    bounds = boundaries(settings.nfe, settings.final_step_ratio)
    lengths = bounds[:-1] - bounds[1:]
    noise = noise.astype(jnp.promote_types(noise.dtype, jnp.float32))
    number, parts = part
    whole = len(noise) * parts

    def own(drawn: Any) -> Any:  # this part of what is drawn for the whole batch
        return jax.tree.map(lambda x: part_of(x, number, parts), drawn) if parts > 1 else drawn

    def segment(params, x, start, length, weight, key, straight=None):
        draw_key, dropout_key = jax.random.split(key)
        if parts > 1:
            dropout_key = jax.random.fold_in(dropout_key, number)
        sigma = jnp.broadcast_to(sigma_of(start, settings.shift), x.shape[:1])
        curve = student(params, x, sigma, dropout_key)
        draws = own(Draws.draw(draw_key, whole, curve.modes, settings.states))
        loss, end, log = segment_loss(
            curve, teacher, x, start, length, draws, settings=settings, teacher_share=teacher_share
        )
        if straight is not None and settings.data_weight:
            reconstruction = 0.5 * jnp.square(curve.velocity(settings.span(start, length), sigma) - straight).mean()
            loss += settings.data_weight * reconstruction
            log |= {"reconstruction": jax.lax.stop_gradient(reconstruction)}
        return weight * loss, (end, log)

    segment_gradient = jax.value_and_grad(segment, has_aux=True)
    if latents is not None:
        chex.assert_equal_shape([noise, latents])
        index_key, key = jax.random.split(key)
        index = own(jax.random.categorical(index_key, jnp.log(lengths), shape=(whole,)))
        start, length = bounds[index], lengths[index]
        sigma = sigma_of(start, settings.shift)[:, None, None]
        x = (1 - sigma) * latents + sigma * noise
        (loss, (_, log)), gradient = segment_gradient(params, x, start, length, 1.0, key, noise - latents)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        return loss, total, jax.tree.map(lambda value: value[None], log)

    def step(carry: tuple, inputs: tuple[jax.Array, ...]) -> tuple[tuple, tuple]:
        x, total = carry
        index, start, length = inputs
        segment_key = jax.random.fold_in(key, index)
        (loss, (x, log)), gradient = segment_gradient(params, x, start, length, length, segment_key)
        return (x, jax.tree.map(jnp.add, total, gradient)), (loss, log)

    # A loop, so that the compiled program holds one copy of both networks for any number of segments
    carry = (noise, jax.tree.map(jnp.zeros_like, params) if total is None else total)
    (_, total), (losses, logs) = jax.lax.scan(step, carry, (jnp.arange(settings.nfe), bounds[:-1], lengths))
    return losses.sum(), total, logs
