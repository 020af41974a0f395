"""Draws docs/method.png: the method on a toy teacher in one dimension, which is solved exactly.

The data are a mixture of two Gaussians, so the teacher's velocity is known exactly. On the left, the student is ideal:
on each segment a momentum mixture is fitted to the teacher's velocity. On the right, it is the student before training,
whose velocity is constant on a segment.

    python docs/make_method_figure.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from arcflow_jax.flow.curve import Span
from arcflow_jax.flow.distill import Distillation, Draws, visit
from arcflow_jax.flow.momentum import Mixture
from arcflow_jax.flow.schedule import boundaries, euler_grid, sigma_of

SETTINGS = Distillation(states=4, mode_dropout=0.0)
CENTRES, SPREAD = np.array([-1.6, 1.2]), 0.3
NOISE = 0.55  # where the trajectories start
SEED = 0
MOMENTA = np.array([0.5, 2.0, 4.0, 7.0])  # e^g of the modes after the first one
BLUE, RED, GREY = "#1f5fa8", "#c8402f", "#6b6b6b"


def teacher(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """The exact velocity E[ε − x₀ | x] of states x [B, N, D] at σ [B] or scalar."""
    sigma = jnp.asarray(sigma).reshape(-1, 1, 1, 1)
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    away = x[..., None] - (1 - sigma) * CENTRES  # [B, N, D, 2]
    weights = jax.nn.softmax(-(away**2) / (2 * variance), axis=-1)
    datum = CENTRES + (1 - sigma) * SPREAD**2 / variance * away
    noise = sigma / variance * away
    return (weights * (noise - datum)).sum(-1)


def path(x: float, start: float, end: float, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """σ and the teacher's states from x at σ = start down to σ = end, by many Heun steps."""
    sigmas, states = np.linspace(start, end, steps + 1), [x]
    for a, b in itertools.pairwise(sigmas):
        first = scalar_velocity(states[-1], a)
        second = scalar_velocity(states[-1] + (b - a) * first, b)
        states.append(states[-1] + (b - a) * (first + second) / 2)
    return sigmas, np.array(states)


@jax.jit
def array_velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
    return teacher(x.reshape(1, 1, 1), sigma)[0, 0, 0]


def scalar_velocity(x: float, sigma: float) -> float:
    return float(array_velocity(jnp.float32(x), jnp.float32(sigma)))


def ideal_curve(x: float, span: Span) -> Mixture:
    """The mixture whose velocity is closest to the teacher's along its exact trajectory from x, in least squares."""
    sigmas, states = path(x, float(span.src), float(span.end))
    velocities = np.array([scalar_velocity(*pair) for pair in zip(states, sigmas, strict=True)])
    momenta = np.concatenate([[0.0], np.log(MOMENTA)])
    modes = np.exp(momenta * (float(span.src) - sigmas)[:, None])
    means = np.linalg.lstsq(modes, velocities, rcond=1e-4)[0] * len(momenta)  # π is uniform, 1/K
    per_pixel = (1, 1, len(momenta), 1, 4)  # one token, whose four pixels are equal
    return Mixture(
        means=jnp.broadcast_to(jnp.float32(means)[:, None, None], per_pixel),
        logits=jnp.zeros((1, 1, len(momenta), 4)),
        log_momenta=jnp.broadcast_to(jnp.float32(momenta[1:])[:, None], (1, 1, len(momenta) - 1, 4)),
    )


def straight_curve(x: float, span: Span) -> Mixture:
    """The student before training: a constant velocity, the teacher's at the start of the segment."""
    velocity = scalar_velocity(x, float(span.src))
    return Mixture(jnp.full((1, 1, 1, 1, 4), velocity), jnp.zeros((1, 1, 1, 4)), jnp.zeros((1, 1, 0, 4)))


def followed(curve: Mixture, span: Span, x: float, start: jax.Array, end: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """σ and the curve's states from x at σ = start down to σ = end."""
    sigmas = np.linspace(float(start), float(end), 60)
    return sigmas, np.array([x - float(curve.displacement(span, start, s)[0, 0, 0]) for s in sigmas])


def draw_sampling(axes: plt.Axes, segments: list[tuple[float, float]]) -> None:
    """The student's two evaluations, against two Euler steps of the teacher."""
    grid, states = np.asarray(euler_grid(SETTINGS.nfe, SETTINGS.shift)), [NOISE]
    for a, b in itertools.pairwise(grid):
        states.append(states[-1] + (b - a) * scalar_velocity(states[-1], a))
    axes.plot(grid, states, "--s", color=RED, linewidth=1.5, markersize=5, label="teacher, 2 Euler steps")
    x = NOISE
    for number, (start, length) in enumerate(segments):
        span = SETTINGS.span(start, length)
        sigmas, states = followed(ideal_curve(x, span), span, x, span.src, span.end)
        labels = ({}, {}) if number else ({"label": "student's curve"}, {"label": "student evaluation"})
        axes.plot(sigmas, states, color=BLUE, linewidth=3, alpha=0.8, **labels[0])
        axes.plot(sigmas[0], states[0], "o", color=BLUE, markersize=9, zorder=5, **labels[1])
        x = states[-1]
    axes.plot(0.0, x, "*", color=BLUE, markersize=13, zorder=5, clip_on=False, label="sample")


def draw_training(axes: plt.Axes, segments: list[tuple[float, float]]) -> None:
    """The mixed trajectory of a student before training, at a teacher's share of one half."""
    x = NOISE
    for number, (start, length) in enumerate(segments):
        span = SETTINGS.span(start, length)
        curve = straight_curve(x, span)
        draws = Draws.draw(jax.random.key(SEED + number), 1, curve.modes, SETTINGS.states)
        at = {"start": jnp.full(1, start), "length": jnp.full(1, length)}
        noise, share = jnp.full((1, 1, 4), x, jnp.float32), jnp.float32(0.5)
        visits = visit(curve, teacher, noise, **at, draws=draws, settings=SETTINGS, teacher_share=share)
        arrive, leave = (np.asarray(sigma_of(t, SETTINGS.shift))[:, 0] for t in (visits.arrive, visits.leave))
        states, targets = (np.asarray(y)[:, 0, 0, 0] for y in (visits.states, visits.targets))

        def label(text: str, first: bool = number == 0) -> dict[str, str]:
            return {"label": text} if first else {}

        axes.plot(*followed(curve, span, x, span.src, span.end), ":", color=BLUE, **label("student's curve"))
        axes.plot(float(span.src), x, "o", color=BLUE, markersize=9, zorder=5, **label("student evaluation"))
        ends = states + targets * (leave - arrive)
        starts = [(float(span.src), x), *zip(leave, ends, strict=True)]
        stops = [*arrive, float(span.end)]
        for i, ((sigma, state), stop) in enumerate(zip(starts, stops, strict=True)):
            move = followed(curve, span, state, sigma, stop)
            axes.plot(*move, color=BLUE, linewidth=3, alpha=0.8, **label("moved by the student", number == i == 0))
        for i in range(SETTINGS.states):
            text = label("moved by the teacher", number == i == 0)
            axes.plot([arrive[i], leave[i]], [states[i], ends[i]], color=RED, linewidth=3, **text)
        axes.plot(
            arrive, states, "o", color=RED, markersize=7, zorder=4, **label("visited state: velocities are matched")
        )
        x = float(visits.end[0, 0, 0])


def main() -> None:
    bounds = np.asarray(boundaries(SETTINGS.nfe, SETTINGS.final_step_ratio))
    segments = list(zip(bounds[:-1].tolist(), (-np.diff(bounds)).tolist(), strict=True))
    sigmas = np.asarray(sigma_of(bounds, SETTINGS.shift))
    _, panels = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    for axes, title, draw in zip(
        panels,
        ("Sampling: a trained student, NFE = 2", "Distillation: a mixed trajectory, teacher's share ½"),
        (draw_sampling, draw_training),
        strict=True,
    ):
        axes.plot(*path(NOISE, 1.0, 0.0), color="black", linewidth=1.2, label="teacher's exact trajectory")
        draw(axes, segments)
        for sigma in sigmas:
            axes.axvline(sigma, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        for i in range(SETTINGS.nfe):
            place = (sigmas[i : i + 2].mean(), 0.97)
            axes.annotate(
                f"segment {i + 1}", place, xycoords=("data", "axes fraction"), ha="center", va="top", color=GREY
            )
        axes.set(xlim=(1.03, -0.03), xlabel="noise level σ", title=title)
        axes.set_xticks(sigmas, ["1\nnoise", f"{sigmas[1]:.2f}", "0\ndata"])
        axes.legend(loc="upper left", bbox_to_anchor=(0.01, 0.92), fontsize=9)
    panels[0].set_ylabel("state x")
    plt.tight_layout()
    plt.savefig(Path(__file__).parent / "method.png", dpi=110)


if __name__ == "__main__":
    main()
