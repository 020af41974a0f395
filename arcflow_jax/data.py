"""The stream of prompts that a run is trained on."""

from __future__ import annotations

from collections.abc import Sequence

import grain


def prompt_batches(prompts: Sequence[str], batch: int, seed: int) -> grain.MapDataset:
    """Batches of prompts, shuffled anew each time round, without end: item i is the batch of iteration i.

    Being indexed by the iteration, the stream needs no state to go on where a run stopped.
    """
    return grain.MapDataset.source(list(prompts)).seed(seed).shuffle().repeat().batch(batch, batch_fn=list)
