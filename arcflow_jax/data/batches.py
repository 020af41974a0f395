"""The prompts and the resolution of a training step, as functions of the seed and the step.

So a run resumes without any stored state of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from arcflow_jax.errors import UserError


def prompt_batches(prompts: Sequence[Any], batch: int, seed: int, part: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """Batches of prompts, shuffled again in each epoch, without end. Item i is one process's part of step i's batch.

    The whole batch does not depend on the number of parts.

    Args:
      prompts: prompts, or other examples.
      batch: prompts per training step, of all parts together.
      part: (index, count): rows index · batch / count up to (index + 1) · batch / count of each batch.

    Raises:
      UserError: if the batch is not divisible by the number of parts.
    """
    index, count = part
    if batch % count:
        raise UserError(f"batch {batch} is not divisible by {count}, the number of parts that processes read")
    rows = slice(index * batch // count, (index + 1) * batch // count)
    # Every process has all texts in any case; only encoding them is expensive
    shuffled = grain.MapDataset.source(prompts).seed(seed).shuffle().repeat()
    return shuffled.batch(batch, batch_fn=lambda texts: list(texts[rows]))


def draw_resolution(resolutions: Sequence[tuple[int, int]], seed: int, step: int) -> tuple[int, int]:
    """The (height, width) of a training step, drawn uniformly."""
    # NumPy guarantees the bits of a SeedSequence for all versions, but not the integers of its generators
    (bits,) = np.random.SeedSequence((seed, step)).generate_state(1)
    return resolutions[int(bits) % len(resolutions)]
