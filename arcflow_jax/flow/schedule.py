"""Noise levels: the time sigma_of, the segments of a few-step generator, the teacher's Euler grid.

σ ∈ [0, 1] is the noise level, 1 for pure noise, 0 for data. Raw time t ∈ [0, 1] runs the same way and is what
segments and steps divide evenly; σ is t warped towards the noise by `shift` (3.2 for FLUX.1 and Qwen-Image).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def sigma_of(t: jax.Array, shift: jax.Array | float) -> jax.Array:
    """σ of raw time t: s·t / (1 + (s − 1)·t) (Esser et al. 2024, arXiv 2403.03206, §5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


def timestep_of(sigma: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Raw time of σ, the inverse of `warp`."""
    return sigma / (shift - (shift - 1) * sigma)


def boundaries(segments: int, final_step_ratio: jax.Array | float) -> jax.Array:
    """Where the segments of an n-call generator begin and end, in raw time from 1 down to 0: [segments + 1].

    All segments are equally long but the last, which is `final_step_ratio` times as long.
    """
    base = 1 / (segments - 1 + final_step_ratio)
    return jnp.append(1 - base * jnp.arange(segments), 0.0)


def euler_grid(steps: int, shift: jax.Array | float, terminal: jax.Array | float | None = None) -> jax.Array:
    """The σ that the teacher's Euler solver visits, from 1 down to 0, even in raw time: [steps + 1].

    With `terminal`, all but the 0 are stretched so that they end there (diffusers' `shift_terminal`, of Qwen-Image).
    """
    grid = sigma_of(jnp.linspace(1.0, 0.0, steps + 1), shift)
    if terminal is None or steps == 1:
        return grid
    return jnp.append(1 - (1 - grid[:-1]) * (1 - terminal) / (1 - grid[-2]), 0.0)


def scheduler_shift(config: dict[str, Any], tokens: int) -> float:
    """The time shift of a diffusers FlowMatchEulerDiscreteScheduler for an image of this many tokens.

    With dynamic shifting, e^μ, μ linear in the number of tokens (diffusers' `calculate_shift`); else a constant.
    """
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(base + (most - base) * (tokens - low) / (high - low))
