"""What a training step is trained on, its prompts and its image size: functions of the seed and of the step's number.

So a run that stopped needs no state of theirs to resume.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import grain
import numpy as np

Size = tuple[int, int]  # (height, width) in pixels
Rows = Sequence[int] | None  # of a batch, that a process loads (see `processes.local_rows`); None for all


def shuffled_batches(examples: Sequence[Any], batch: int, seed: int, rows: Rows = None) -> grain.MapDataset:
    """Batches of examples, shuffled anew in each epoch, without end: item i is one process's rows of batch i.

    Args:
      examples: prompts, or others.
      batch: examples in a batch, of all processes together.
      rows: which of them to take.
    """
    rows = range(batch) if rows is None else rows
    # Every process has all prompts in memory anyway; what costs is encoding them
    shuffled = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    return shuffled.batch(batch, batch_fn=lambda texts: [texts[row] for row in rows])


def draw_size(sizes: Sequence[Size], seed: int, step: int) -> Size:
    """The image size of a training step, each entry of `sizes` as likely as the others."""
    # NumPy promises never to change the bits of SeedSequence. It does not for its generators' integers
    (bits,) = np.random.SeedSequence((seed, step)).generate_state(1)
    return sizes[int(bits) % len(sizes)]


class MixedBatches:
    """Batches whose size does not depend on the examples.

    Item i is what training step i, counted from 0, takes: this process's rows of the batch, and the image size.
    Arguments as in `shuffled_batches` and `draw_size`.
    """

    def __init__(self, examples: Sequence[Any], sizes: Sequence[Size], batch: int, seed: int, rows: Rows = None):
        self.batches, self.sizes, self.seed = shuffled_batches(examples, batch, seed, rows), sizes, seed

    def size(self, step: int) -> Size:
        """The image size of a step."""
        return draw_size(self.sizes, self.seed, step)

    def __getitem__(self, step: int) -> tuple[list[Any], Size]:
        return self.batches[step], self.size(step)


class BucketedBatches:
    """Batches of examples of one size each. A step's size is drawn in proportion to the number of its examples.

    Items as in `MixedBatches`. Within a size, examples are taken in epochs, as in `shuffled_batches`.

    Args:
      examples: prompts, or others.
      sizes: of each example.
      batch, seed, rows: as in `shuffled_batches`.
    """

    def __init__(self, examples: Sequence[Any], sizes: Sequence[Size], batch: int, seed: int, rows: Rows = None):
        self.sizes, self.seed = sizes, seed
        buckets = collections.defaultdict(list)
        for example, size in zip(examples, sizes, strict=True):
            buckets[size].append(example)
        self.batches = {size: shuffled_batches(bucket, batch, seed, rows) for size, bucket in buckets.items()}
        self.taken: collections.Counter[Size] = collections.Counter()  # batches of each size in the steps so far
        self.places: list[tuple[Size, int]] = []  # of each step so far: its size, and which batch of that size

    def size(self, step: int) -> Size:
        """The image size of a step."""
        return draw_size(self.sizes, self.seed, step)

    def __getitem__(self, step: int) -> tuple[list[Any], Size]:
        for earlier in range(len(self.places), step + 1):
            size = self.size(earlier)
            self.places.append((size, self.taken[size]))
            self.taken[size] += 1
        size, index = self.places[step]
        return self.batches[size][index], size


class Ahead:
    """Results of a function for a range of training steps, in order. A thread is one step ahead of who takes them.

    Attributes:
      waited: seconds in which the devices had nothing to do because `take` waited.
    """

    def __init__(self, load: Callable[[int], Any], steps: range):
        self.load, self.left, self.waited = load, iter(steps), 0.0
        self.thread = ThreadPoolExecutor(1)
        self.coming = self._begin()

    def _begin(self) -> Future[Any] | None:
        step = next(self.left, None)
        return None if step is None else self.thread.submit(self.load, step)

    def take(self, busy: Callable[[], bool]) -> Any:
        """The next step's result.

        Args:
          busy: whether the devices still work on the step before. That time is not counted as waited.

        Raises:
          Exception: what the function raised for that step.
        """
        assert self.coming is not None, "all steps are taken"
        while not self.coming.done():
            began = time.monotonic()
            wait([self.coming], timeout=0.005)
            if not busy():
                self.waited += time.monotonic() - began
        result = self.coming.result()
        self.coming = self._begin()
        return result

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown(cancel_futures=True)
