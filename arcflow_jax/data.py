"""The streams that a run is trained on, its prompts and its resolutions.

Both are without end, shuffled anew each time round, and indexed by the iteration: they need no state to go on where a
run stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain

from arcflow_jax.errors import UserError


def prompt_batches(prompts: Sequence[str], batch: int, seed: int, part: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """Batches of prompts, as lists: item i is one process' part of the batch of iteration i.

    The whole batch does not depend on how many parts there are.

    Args:
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


def resolution_stream(resolutions: Sequence[tuple[int, int]], seed: int) -> grain.MapDataset:
    """Item i is the (height, width) of iteration i. Each comes as often as the others, or as it is listed."""
    return grain.MapDataset.source(resolutions).seed(seed).shuffle().repeat()
