"""Where a student's trajectory departs from its teacher's, and why: pure functions.

Both start from the same noise. The dense teacher takes S Euler steps. Between two nodes σ_i it moves in a straight
line, so its state x_T(σ) is known everywhere, and its velocity u_T at the nodes. The student follows one curve per
segment, predicted at σ_src, where the segment starts. Two such curves are compared with the teacher on each segment:

    own      v_S, predicted at the student's own state:   x_S(σ) = x_S(σ_src) − ∫ v_S    how the student samples
    forced   v_F, predicted at the teacher's state:       x_F(σ) = x_T(σ_src) − ∫ v_F    without earlier errors

∫ runs from σ up to σ_src. x̂ is the same state with ∫ computed by quadrature instead of in closed form. The errors are
sums of these vectors, exactly:

    velocity, at a node:   v_S − u_T = (v_F − u_T) + (v_S − v_F)
                                          local         drift
    state, at any σ:       x_S − x_T = (x̂_F − x_T) + (x̂_S − x̂_F) + (x_S − x̂_S)
                                          local         drift        closed form

- *local*: the error that the student makes on this segment when it starts from the teacher's state (the local error
  of numerical analysis). For the state it is the velocity's local error, integrated.
- *drift*: the error inherited from earlier segments, because the student starts from its own state. It is zero on the
  first segment, which starts from the noise.
- *closed form*: the difference between the curve's exact integral and dense quadrature of the same curve. It should
  be rounding error only.

Sizes are mean squares over tokens and features, in latent units. Squares do not add like vectors: |a + b|² = |a|² +
|b|² + 2⟨a, b⟩. The products are reported as *cross*, and total = local + drift + closed form + cross.
"""

# B batch, N tokens, D features of a token, S teacher steps, n segments, P = S + n points of comparison

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arcflow_jax.errors import UserError
from arcflow_jax.flow.curve import Curve, Span

# Nodes and weights of Gauss-Legendre quadrature on [−1, 1], applied between each point and the next
NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)
# A node this close to a segment's start counts as its start: the two grids are rounded differently
TOLERANCE = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """The noise levels of a comparison: the teacher's nodes, the student's segments, and the points P.

    The points of a segment are the teacher's nodes in it, and its end. They are in order of falling σ.
    """

    nodes: np.ndarray  # [S + 1] σ, from 1 down to 0
    spans: Span  # src and end, each [n] σ
    start_node: np.ndarray  # [n]: the last node at or before the segment's start
    sigma: np.ndarray  # [P]
    previous: np.ndarray  # [P] σ of the previous point of the same segment; for its first point, the segment's start
    first: np.ndarray  # [P] bool: whether it is the first point of its segment
    segment: np.ndarray  # [P]: index of the segment
    node: np.ndarray  # [P]: index of the last node at or before the point
    at_node: np.ndarray  # [P] bool: whether the point is a node; False for the end of a segment

    @classmethod
    def between(cls, nodes: Any, bounds: Any) -> Grid:
        """From the teacher's nodes [S + 1] and the segments' boundaries [n + 1], both in σ from 1 down to 0.

        Raises:
          UserError: if a segment has fewer than two nodes.
        """
        nodes, bounds = np.asarray(nodes), np.asarray(bounds)
        last = len(nodes) - 1  # σ = 0, where the teacher's velocity is not evaluated
        points, start_node = [], []
        for segment, (src, end) in enumerate(itertools.pairwise(bounds)):
            within = [i for i in range(last) if src + TOLERANCE >= nodes[i] > end + TOLERANCE]
            if len(within) < 2:
                raise UserError(
                    f"{last} teacher steps are too few to compare {len(bounds) - 1} segments: segment {segment + 1}, "
                    f"σ {src:.3f} to {end:.3f}, contains {len(within)} of them and needs at least 2"
                )
            start_node.append(max(i for i in range(last) if nodes[i] >= src - TOLERANCE))
            previous = src
            for i in within:
                points.append((nodes[i], previous, i == within[0], segment, i, True))
                previous = nodes[i]
            points.append((end, previous, False, segment, within[-1], False))
        columns = [np.array(column) for column in zip(*points, strict=True)]
        return cls(nodes, Span(bounds[:-1], bounds[1:]), np.array(start_node), *columns)

    @property
    def steps(self) -> int:
        """n, the student's steps."""
        return len(self.start_node)


def quadrature(curve: Curve, span: Span, sigma_a: jax.Array, sigma_b: jax.Array) -> jax.Array:  # [B, N, D]
    """∫ v dσ from σ_b up to σ_a, numerically; `curve.displacement` is the same in closed form. Scalar σ_a and σ_b."""
    middle, half = (sigma_a + sigma_b) / 2, (sigma_a - sigma_b) / 2

    def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        node, weight = pair
        return total + weight * curve.velocity(span, middle + half * node), None

    start = jax.eval_shape(curve.velocity, span, sigma_a)
    rule = tuple(jnp.asarray(values, start.dtype) for values in (NODES, WEIGHTS))
    total, _ = jax.lax.scan(add, jnp.zeros(start.shape, start.dtype), rule)
    return half * total


def size(x: jax.Array) -> jax.Array:  # [B, N, D] -> [B]
    """Mean square over tokens and features."""
    return jnp.square(x).mean((1, 2))


def decompose(total: jax.Array, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sizes [B] of an error [B, N, D] and of the parts that sum to it; `cross` is the share of their products."""
    vectors = list(parts.values())
    cross = sum(2 * (a * b).mean((1, 2)) for i, a in enumerate(vectors) for b in vectors[:i])
    return {"total": size(total), **{name: size(part) for name, part in parts.items()}, "cross": cross}


def compare(
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    student: Callable[[jax.Array, jax.Array], Curve],
    latents: jax.Array,
    grid: Grid,
) -> tuple[dict[str, dict[str, jax.Array]], jax.Array]:
    """Runs both from noise `latents` [B, N, D]: S calls of teacher(x, σ [B]), 2n − 1 calls of student(x, σ [B]).

    The teacher's whole trajectory stays in memory: 2·S times the latents, in float32.

    Returns:
      Mean squares, each [P, B], under `velocity` and `state`: total, local, drift, cross and, for the state,
      closed_form (see above). Also velocity's `teacher`, the size of u_T, and state's `displacement`, the distance
      that x_S has moved on its segment. Velocities are meaningless where `grid.at_node` is false.
      The teacher's end state [B, N, D].
    """
    latents = latents.astype(jnp.promote_types(latents.dtype, jnp.float32))
    grid = jax.tree.map(lambda x: jnp.asarray(x, latents.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, grid)
    batch, nodes, spans = len(latents), grid.nodes, grid.spans

    def euler(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        sigma, sigma_next = pair
        u = teacher(x, jnp.full(batch, sigma)).astype(x.dtype)
        return x + u * (sigma_next - sigma), (x, u)

    end, (states, velocities) = jax.lax.scan(euler, latents, (nodes[:-1], nodes[1:]))

    def teacher_state(node: jax.Array, sigma: jax.Array) -> jax.Array:
        return states[node] + velocities[node] * (sigma - nodes[node])

    def follow(x: jax.Array, span: Span) -> tuple[jax.Array, tuple[jax.Array, Curve]]:
        curve = student(x, jnp.full(batch, span.src))
        return x - curve.displacement(span, span.src, span.end), (x, curve)

    _, (own_starts, own) = jax.lax.scan(follow, latents, spans)
    forced_starts = jax.vmap(teacher_state)(grid.start_node, spans.src)
    # The first segment starts from the same noise, so its forced curve is its own curve
    forced = jax.lax.map(lambda at: student(at[0], jnp.full(batch, at[1])), (forced_starts[1:], spans.src[1:]))
    forced = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b]), own, forced)

    def point(done: tuple[jax.Array, jax.Array], at: tuple[jax.Array, ...]) -> tuple[tuple, dict[str, Any]]:
        sigma, previous, first, segment, node = at
        own_start, own_curve, forced_start, forced_curve, span = jax.tree.map(
            lambda x: x[segment], (own_starts, own, forced_starts, forced, spans)
        )
        # Displacement since the segment's start, by quadrature
        own_moved, forced_moved = (
            jnp.where(first, 0.0, moved) + quadrature(curve, span, previous, sigma)
            for moved, curve in zip(done, (own_curve, forced_curve), strict=True)
        )
        exact = own_curve.displacement(span, span.src, sigma)
        x, u = teacher_state(node, sigma), velocities[node]
        v_own, v_forced = (curve.velocity(span, sigma) for curve in (own_curve, forced_curve))
        velocity = decompose(v_own - u, {"local": v_forced - u, "drift": v_own - v_forced})
        velocity["teacher"] = size(u)
        state = decompose(
            (own_start - exact) - x,
            {
                "local": (forced_start - forced_moved) - x,
                "drift": (own_start - forced_start) - (own_moved - forced_moved),
                "closed_form": own_moved - exact,
            },
        )
        state["displacement"] = size(exact)
        return (own_moved, forced_moved), {"velocity": velocity, "state": state}

    nothing = jnp.zeros_like(latents)
    points = (grid.sigma, grid.previous, grid.first, grid.segment, grid.node)
    _, sizes = jax.lax.scan(point, (nothing, nothing), points)
    return sizes, end
