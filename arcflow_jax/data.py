"""The stream of prompts that a run is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain


def prompt_batches(prompts: Sequence[Any], batch: int, seed: int, part: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """Batches of prompts, shuffled anew each time round, without end: item i is the batch of iteration i.

    Of each batch it has the rows of one `part`, (index, count), of as many even ones. Being indexed by the
    iteration, the stream needs no state to go on where a run stopped.
    """
    index, count = part
    rows = slice(index * batch // count, (index + 1) * batch // count)
    whole = grain.MapDataset.source(list(prompts)).seed(seed).shuffle().repeat().batch(batch, batch_fn=list)
    return whole.map(lambda batch: batch[rows])
