"""Noise levels σ and timesteps t: the timestep shift, the segments of a few-step generator, the Euler grid.

σ ∈ [0, 1] is the noise level: 1 is pure noise, 0 is data. The timestep t ∈ [0, 1] runs in the same direction. Segments
and Euler steps divide t evenly; the timestep shift (3.2 for ArcFlow's FLUX.1 and Qwen-Image) maps t to a larger σ.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from msgspec import Meta

from arcflow_jax.errors import UserError
from arcflow_jax.schema import Count, Share, Shift

MOST_LOG_SHIFT = 10
LogShift = Annotated[float, Meta(ge=-MOST_LOG_SHIFT, le=MOST_LOG_SHIFT)]


def sigma_of(t: jax.Array, shift: jax.Array | float) -> jax.Array:
    """σ of timestep t with shift s: s·t / (1 + (s − 1)·t) (Esser et al. 2024, arXiv 2403.03206, §5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


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
    return euler_level(jnp.linspace(1.0, 0.0, steps + 1), steps, shift, terminal)


def euler_level(
    t: jax.Array | float, steps: int, shift: jax.Array | float, terminal: jax.Array | float | None = None
) -> jax.Array:
    """σ of timestep t on the schedule of `euler_grid`, also between its levels."""
    sigma = sigma_of(jnp.asarray(t), shift)
    if terminal is None or steps == 1:
        return sigma
    stretched = 1 - (1 - sigma) * (1 - terminal) / (1 - sigma_of(jnp.asarray(1 / steps), shift))
    return jnp.where(t * steps < 1, t * steps * terminal, stretched)  # the last step has no level inside


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A diffusers FlowMatchEulerDiscreteScheduler, with the names and defaults of its scheduler_config.json.

    Attributes:
      shift: the timestep shift.
      use_dynamic_shifting: whether the shift depends on the size of the image instead, see `shift_for`.
      base_shift, max_shift: its logarithm at the numbers of tokens `base_image_seq_len` and `max_image_seq_len`.
      shift_terminal: see `euler_grid`; 0 is none.
    """

    shift: Shift = 1.0
    use_dynamic_shifting: bool = False
    base_shift: LogShift = 0.5
    max_shift: LogShift = 1.15
    base_image_seq_len: Count = 256
    max_image_seq_len: Count = 4096
    shift_terminal: Share | None = None

    REQUIRED: ClassVar[dict[str, Any]] = {
        "time_shift_type": "exponential",
        "invert_sigmas": False,
        "stochastic_sampling": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
    }

    def __post_init__(self):
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise UserError(
                f"max_image_seq_len is {self.max_image_seq_len}, but has to be above base_image_seq_len, "
                f"{self.base_image_seq_len}"
            )

    def shift_for(self, tokens: int, log_shift: float | None = None) -> float:
        """The timestep shift for an image of this many tokens.

        With dynamic shifting it is e^μ, where μ is `log_shift` or, by default, linear in the number of tokens
        (diffusers' `calculate_shift`). Otherwise it is a constant.

        Raises:
          UserError: if μ is absurd, because the image has far more or fewer tokens than the scheduler is made for.
        """
        if not self.use_dynamic_shifting:
            return self.shift
        low, high = self.base_image_seq_len, self.max_image_seq_len
        linear = self.base_shift + (self.max_shift - self.base_shift) * (tokens - low) / (high - low)
        log = linear if log_shift is None else log_shift
        if abs(log) > MOST_LOG_SHIFT:
            raise UserError(f"the scheduler's timestep shift is e^{log:.3g} for an image of {tokens} tokens")
        return math.exp(log)
