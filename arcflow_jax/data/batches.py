"""What an iteration is trained on, its prompts and its resolution: functions of the seed and of the iteration's number.

So a run that stopped needs no state of theirs to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from arcflow_jax.errors import UserError


def prompt_batches(prompts: Sequence[Any], batch: int, seed: int, part: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """Batches of prompts, shuffled anew each time round, without end: item i is one process' part of iteration i's.

    The whole batch does not depend on how many parts there are.

    Args:
      prompts: or other examples.
      batch: prompts an iteration, of all parts together.
      part: (index, count): rows index · batch / count up to (index + 1) · batch / count of each batch.

    Raises:
      UserError: if the batch does not divide by the number of parts.
    """
    index, count = part
    if batch % count:
        raise UserError(f"batch {batch} does not divide by the {count} parts that processes read")
    rows = slice(index * batch // count, (index + 1) * batch // count)
    # The texts of the whole batch are at hand in any case; what costs is what is made of them
    shuffled = grain.MapDataset.source(prompts).seed(seed).shuffle().repeat()
    return shuffled.batch(batch, batch_fn=lambda texts: list(texts[rows]))


def draw_resolution(resolutions: Sequence[tuple[int, int]], seed: int, iteration: int) -> tuple[int, int]:
    """The (height, width) of an iteration, each as likely as the others."""
    # Whose bits NumPy promises never to change, as it does not for its generators' integers
    (bits,) = np.random.SeedSequence((seed, iteration)).generate_state(1)
    return resolutions[int(bits) % len(resolutions)]
