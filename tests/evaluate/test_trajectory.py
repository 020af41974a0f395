"""Error decomposition on a teacher and a student whose trajectories are known in closed form."""

# B batch, N tokens, D features of a token, S teacher steps, n segments

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.trajectory.figures import Grid, compare, quadrature
from arcflow_jax.flow.curve import Curve, Span
from arcflow_jax.flow.momentum import Mixture
from arcflow_jax.flow.schedule import boundaries, euler_grid, sigma_of

A, C, G = 0.7, 0.5, 0.9  # teacher: u = A·x; student: v(σ) = C·x_src·exp(G·(σ_src − σ))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Growing(Curve):
    """v(σ) = start · exp(G·(σ_src − σ)); its displacement is wrong by `wrong` per unit of σ."""

    start: jax.Array  # [B, N, D]
    wrong: jax.Array

    @property
    def modes(self) -> int:
        return 1

    def velocity(self, span, sigma):
        return self.start * jnp.exp(G * (span.src - sigma))

    def mean_velocity(self, span, sigma_a, sigma_b):
        raise NotImplementedError

    def displacement(self, span, sigma_a, sigma_b):
        grown = (jnp.exp(G * (span.src - sigma_b)) - jnp.exp(G * (span.src - sigma_a))) / G
        return self.start * grown + self.wrong * (sigma_a - sigma_b)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def noise(batch: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 4, 8))


def grid_of(steps: int, segments: int, shift: float) -> Grid:
    """A grid whose later segments start between two nodes of the teacher."""
    return Grid.between(euler_grid(steps, 1.0), sigma_of(boundaries(segments, 0.7), shift))


def teacher(x, sigma):
    return A * x


def student(wrong: float = 0.0):
    return lambda x, sigma: Growing(C * x, jnp.asarray(wrong, x.dtype))


@pytest.mark.parametrize("segments", [1, 3])
def test_every_part_matches_its_formula(x64, segments):
    grid, x0 = grid_of(9, segments, 2.0), noise()
    sizes, end = jax.tree.map(np.asarray, compare(teacher, student(), jnp.asarray(x0), grid))
    square = np.square(x0).mean((1, 2))  # every state and velocity is a multiple of the noise

    nodes = np.asarray(grid.nodes)
    at_nodes = np.cumprod([1, *(1 + A * np.diff(nodes))])

    def teacher_at(sigma):
        return np.interp(-sigma, -nodes, at_nodes)  # Euler moves straight

    def grown(src, sigma):
        return (np.exp(G * (src - sigma)) - 1) / G

    own_starts = [1.0]
    for src, last in zip(*grid.spans, strict=True):
        own_starts.append(own_starts[-1] * (1 - C * grown(src, last)))
    assert not any(np.isclose(src, nodes).any() for src in grid.spans.src[1:])
    points = range(len(grid.sigma))
    for i in points:
        segment, sigma = grid.segment[i], grid.sigma[i]
        src = grid.spans.src[segment]
        own, forced, x = own_starts[segment], teacher_at(src), teacher_at(sigma)
        moved = C * grown(src, sigma)
        state = {"local": forced * (1 - moved) - x, "drift": (own - forced) * (1 - moved)}
        parts = {"state": state}
        if grid.at_node[i]:
            velocity = C * np.exp(G * (src - sigma))
            parts["velocity"] = {"local": forced * velocity - A * x, "drift": (own - forced) * velocity}
            np.testing.assert_allclose(sizes["velocity"]["teacher"][i], (A * x) ** 2 * square)
        for kind, (local, drift) in ((kind, each.values()) for kind, each in parts.items()):
            expected = {"local": local**2, "drift": drift**2, "cross": 2 * local * drift, "total": (local + drift) ** 2}
            for name, value in expected.items():
                np.testing.assert_allclose(sizes[kind][name][i], value * square, atol=1e-14, err_msg=f"{kind} {name}")
        np.testing.assert_allclose(sizes["state"]["displacement"][i], (own * moved) ** 2 * square, atol=1e-14)
    assert sizes["state"]["closed_form"].max() < 1e-28
    np.testing.assert_allclose(end, at_nodes[-1] * x0)
    assert grid.at_node.sum() == 9
    first = grid.segment == 0
    assert sizes["velocity"]["drift"][first].max() < 1e-28  # the same noise, and the same call
    assert segments == 1 or sizes["state"]["drift"][~first].min() > 1e-6


def test_a_wrong_closed_form_is_found(x64):
    """It shows as closed_form in its own segment, and as drift in the next."""
    grid, wrong, x0 = grid_of(10, 2, 1.0), 0.01, noise()
    sizes, _ = jax.tree.map(np.asarray, compare(teacher, student(wrong), jnp.asarray(x0), grid))
    travelled = grid.spans.src[grid.segment] - grid.sigma
    np.testing.assert_allclose(
        sizes["state"]["closed_form"], ((wrong * travelled) ** 2)[:, None] * np.ones(3), atol=1e-16
    )

    length = grid.spans.src[0] - grid.spans.end[0]
    own = x0 * (1 - C * (np.exp(G * length) - 1) / G) - wrong * length
    before = grid.start_node[1]
    nodes = np.asarray(grid.nodes)
    forced = x0 * np.prod(1 + A * np.diff(nodes[: before + 1])) * (1 + A * (grid.spans.src[1] - nodes[before]))
    second = (grid.segment == 1) & grid.at_node
    growth = C * np.exp(G * travelled[second])[:, None]
    expected = growth**2 * np.square(own - forced).mean((1, 2))
    np.testing.assert_allclose(sizes["velocity"]["drift"][second], expected)


def test_quadrature_of_a_mixture_is_its_closed_form(x64):
    """Over spans as short as between two nodes of the teacher, and over a whole trajectory."""
    rng = np.random.default_rng(1)
    means, logits, momenta = (rng.standard_normal(shape) for shape in ((2, 3, 4, 2, 4), (2, 3, 4, 4), (2, 3, 3, 4)))
    mixture = Mixture(*map(jnp.asarray, (means, logits, momenta)))
    for span, (a, b) in ((Span(1.0, 0.5), (0.96, 0.94)), (Span(0.7, 0.0), (0.5, 0.1)), (Span(1.0, 0.0), (1.0, 0.0))):
        exact = mixture.displacement(span, a, b)
        np.testing.assert_allclose(quadrature(mixture, span, a, b), exact, rtol=1e-11, atol=1e-12)


def test_a_segment_may_start_at_a_node():
    """Rounding may put its start on either side of the node."""
    for nudge in (-1e-7, 0.0, 1e-7):
        grid = Grid.between(np.linspace(1, 0, 11), np.array([1, 0.5 + nudge, 0]))
        assert grid.start_node.tolist() == [0, 5]
        assert grid.segment[grid.at_node].tolist() == [0] * 5 + [1] * 5
        assert grid.sigma[~grid.at_node].tolist() == [0.5 + nudge, 0]
        assert grid.node[~grid.at_node].tolist() == [4, 9]
        assert np.flatnonzero(grid.first).tolist() == [0, 6]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_too_few_teacher_steps(steps):
    with pytest.raises(UserError, match=rf"^{steps} teacher steps are too few to compare 2 segments"):
        grid_of(steps, 2, 3.2)
