"""Noise levels σ and timesteps t: the timestep shift, the segments of a few-step generator, the Euler grid.

σ ∈ [0, 1] is the noise level: 1 is pure noise, 0 is data. The timestep t ∈ [0, 1] runs in the same direction. Segments
and Euler steps divide t evenly; the timestep shift (3.2 for ArcFlow's FLUX.1 and Qwen-Image) maps t to a larger σ.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def sigma_of(t: jax.Array, shift: jax.Array | float) -> jax.Array:
    """σ of timestep t with shift s: s·t / (1 + (s − 1)·t) (Esser et al. 2024, arXiv 2403.03206, §5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


def timestep_of(sigma: jax.Array, shift: jax.Array | float) -> jax.Array:
    """The timestep t of σ, the inverse of `sigma_of`."""
    return sigma / (shift - (shift - 1) * sigma)


def boundaries(segments: int, final_step_ratio: jax.Array | float) -> jax.Array:
    """The timesteps between which the segments lie, from 1 down to 0: [segments + 1].

    The last segment is `final_step_ratio` times as long as each of the others.
    """
    base = 1 / (segments - 1 + final_step_ratio)
    return jnp.append(1 - base * jnp.arange(segments), 0.0)


def euler_grid(steps: int, shift: jax.Array | float, terminal: jax.Array | float | None = None) -> jax.Array:
    """The σ that the teacher's Euler solver visits, from 1 down to 0, evenly spaced in t: [steps + 1].

    With `terminal`, all σ but the final 0 are stretched so that the last of them is `terminal` (diffusers'
    `shift_terminal`, which Qwen-Image uses).
    """
    grid = sigma_of(jnp.linspace(1.0, 0.0, steps + 1), shift)
    if terminal is None or steps == 1:
        return grid
    return jnp.append(1 - (1 - grid[:-1]) * (1 - terminal) / (1 - grid[-2]), 0.0)


def scheduler_shift(config: dict[str, Any], tokens: int) -> float:
    """The timestep shift of a diffusers FlowMatchEulerDiscreteScheduler for an image of this many tokens.

    With dynamic shifting it is e^μ, where μ is linear in the number of tokens (diffusers' `calculate_shift`).
    Otherwise it is a constant.
    """
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(base + (most - base) * (tokens - low) / (high - low))
