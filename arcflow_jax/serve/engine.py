"""The queue of images that clients wait for, and the threads that make them in batches. Knows no HTTP."""

# B images, N tokens, C latent channels, H, W size in pixels

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from arcflow_jax.data.output import png
from arcflow_jax.errors import UserError, one_line
from arcflow_jax.generate import noise_of_each
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.sampling_settings import batch_sizes
from arcflow_jax.serve.metrics import Metrics
from arcflow_jax.serve.settings import Settings, Start

LOG = logging.getLogger("arcflow.serve")
ENCODERS = 2  # threads that write PNGs while the next batch runs
FAST = 1  # zlib's level: half the time of its default, for files a fifth larger


class Busy(Exception):
    """The queue is full. `seconds`: when to try again."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full, try again in {seconds} s")
        self.seconds = seconds


class Closed(Exception):
    """The engine is not ready yet, or takes no more requests."""


@dataclasses.dataclass(frozen=True, eq=False)
class Waiting:
    """One image that a client waits for: image `number` of a seed. The future gets its PNG."""

    prompt: str
    settings: Settings
    seed: int
    number: int
    future: Future[bytes]
    since: float
    start: Start | None = None


@dataclasses.dataclass(eq=False)
class Begun:
    """A batch that the devices have, since they were free for it. The images wait for them."""

    batch: Sequence[Waiting]
    images: Iterator[Image.Image]
    since: float


class Engine:
    """Makes images of waiting requests in batches, in one thread for each pipeline.

    A batch takes the image that has waited longest, and others with the same settings. It starts once it has
    `batch_size` images, or the first has waited for `wait` seconds. It is filled up to the next of a few sizes, so it
    runs a compiled program. Each image has noise of its own, so it does not depend on the others. A full batch is
    handed to the devices while another one runs.

    Args:
      pipelines: replicas of one model, each on devices of its own.
      batch_size: most images of a batch, a multiple of data × fsdp of the mesh. Smaller sizes: see `batch_sizes`.
      wait: seconds.
      capacity: images in the queue.
      declared: settings whose programs are compiled before the engine is ready.
      on_request: compiles other programs when they are asked for; otherwise `submit` refuses them.

    Attributes:
      name: of the model: the last part of the adapter's path, or of the teacher's.
      loras: strengths at the start of the style LoRAs that are loaded, by the last parts of their paths.
      failure: why the programs could not be compiled, if so.

    Raises:
      UserError: if the batch size does not fit the mesh.
    """

    def __init__(
        self,
        pipelines: Sequence[ArcFlowPipeline],
        *,
        batch_size: int,
        wait: float,
        capacity: int,
        declared: Sequence[Settings],
        on_request: bool,
        metrics: Metrics,
    ):
        self.pipelines, self.batch_size, self.wait, self.capacity = pipelines, batch_size, wait, capacity
        self.declared, self.on_request, self.metrics = declared, on_request, metrics
        self.pipeline = pipelines[0]
        self._resolved = functools.lru_cache(64)(lambda settings: self.pipeline.settings(**settings.arguments()))
        self._sizes = batch_sizes(self.pipeline.mesh, batch_size)
        # An image's `info` names the weights; where they lie concerns no client
        origin = self.pipeline.origin
        self._names = {key: Path(str(origin[key])).resolve().name for key in ("model", "adapter") if key in origin}
        self.name = self._names.get("adapter", self._names["model"])
        self.loras: dict[str, float] = {}
        self._adapters: dict[str, str] = {}  # their names in the pipelines
        for adapter, lora in self.pipeline.loras.items():
            last = Path(lora.source).name.removesuffix(".safetensors")
            name = next(
                name for i in itertools.count(1) if (name := f"{last}-{i}" if i > 1 else last) not in self.loras
            )
            self.loras[name], self._adapters[name] = lora.weight, adapter
        self.failure: BaseException | None = None
        self._programs = {settings.program for settings in declared}
        self._queue: list[Waiting] = []
        self._changed = threading.Condition()
        self._warm, self._closed, self._batch_seconds = 0, False, 1.0
        self._encoders = ThreadPoolExecutor(ENCODERS, "png")
        self._threads = [threading.Thread(target=self._work, args=[pipe], daemon=True) for pipe in pipelines]

    def start(self) -> None:
        """Starts the threads, which compile first."""
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> bool:
        """Whether all programs are compiled, and requests are taken."""
        return self._warm == len(self.pipelines) and not self._closed and self.failure is None

    def check(self, settings: Settings) -> None:
        """Raises UserError if the settings do not fit the model, or have no compiled program and get none."""
        self._resolved(settings)
        if unknown := [name for name, _ in settings.loras or () if name not in self.loras]:
            raise UserError(f"loras: {one_line(unknown[0])} is not loaded, only {', '.join(self.loras) or 'none'}")
        if not self.on_request and settings.program not in self._programs:
            width, height, steps, *kind = settings.program
            edited = settings.strength is not None or settings.references
            if edited and not any(each[4] for each in self._programs):
                raise UserError("image edits are not served: that takes `arcflow serve --edits`")
            offered = sorted({(w, h, s) for w, h, s, *other in self._programs if other == kind})
            shown = ", ".join(f"{w}x{h} in {s}" for w, h, s in offered) or "none with a negative_prompt"
            raise UserError(f"size {width}x{height} in {steps} steps is not served; served are {shown} steps")

    def submit(
        self, prompt: str, settings: Settings, seed: int, count: int = 1, start: Start | None = None
    ) -> list[Future[bytes]]:
        """Images 0 … count − 1 of a seed, as PNGs with their settings. Cancel the futures if nobody waits any more.

        `start` is the image to start from, of the settings' size, with or without a mask as they say.

        Raises:
          UserError: as `check`.
          Busy: if the queue has no room for them.
          Closed: before the engine is ready, and after `close`.
        """
        self.check(settings)
        now = time.monotonic()
        with self._changed:
            if not self.ready:
                raise Closed("the server is stopping" if self._closed else "the server is starting")
            self._forget_cancelled()
            if len(self._queue) + count > self.capacity:
                batches = len(self._queue) / self.batch_size / len(self.pipelines)
                raise Busy(max(1, math.ceil(batches * self._batch_seconds)))
            added = [Waiting(prompt, settings, seed, number, Future(), now, start) for number in range(count)]
            self._queue += added
            self.metrics.waiting.set(len(self._queue))
            self._changed.notify_all()
        return [each.future for each in added]

    def close(self) -> None:
        """Takes no more requests. What waits is still made."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stop(self, seconds: float | None = None) -> None:
        """Ends the threads, once they have made what waits, or leaves them after so many seconds."""
        self.close()
        for thread in self._threads:
            thread.join(seconds)
        self._encoders.shutdown(wait=seconds is None)

    def _forget_cancelled(self) -> None:
        """Takes images that nobody waits for out of the queue."""
        left = [each for each in self._queue if not each.future.cancelled()]
        self.metrics.cancelled.inc(len(self._queue) - len(left))
        self._queue[:] = left
        self.metrics.waiting.set(len(left))

    def _next(self, wait: bool) -> list[Waiting]:
        """Takes a batch out of the queue: waits for one, or only looks whether there is a full one.

        [] if there is none, or once the engine is closed and nothing waits.
        """
        with self._changed:
            while True:
                self._forget_cancelled()
                left = None
                if self._queue:
                    oldest = self._queue[0]
                    batch = [each for each in self._queue if each.settings == oldest.settings][: self.batch_size]
                    left = oldest.since + self.wait - time.monotonic()
                    if len(batch) == self.batch_size or (wait and (left <= 0 or self._closed)):
                        taken = set(batch)
                        self._queue[:] = [each for each in self._queue if each not in taken]
                        self.metrics.waiting.set(len(self._queue))
                        # From here on a future cannot be cancelled
                        if batch := [each for each in batch if each.future.set_running_or_notify_cancel()]:
                            return batch
                        continue
                if not wait or (self._closed and not self._queue):
                    return []
                self._changed.wait(left)

    def _work(self, pipe: ArcFlowPipeline) -> None:
        """The thread of a pipeline."""
        try:
            # All at once first: with the largest rank compiled, no choice among them compiles anything
            self._choose(pipe, [(name, 1.0) for name in self.loras])
            self._choose(pipe, None)
            for count, settings in itertools.product(self._sizes, self.declared):
                size = settings.height, settings.width
                shape = (*([settings.references] if settings.references else []), *size, 3)
                start = Start(np.zeros(shape, np.uint8), np.ones(size, bool) if settings.masked else None)
                list(self._begin(pipe, [Waiting("warm", settings, 0, 0, Future(), 0.0, start)] * count))
        except BaseException as error:
            self.failure = error
            return
        with self._changed:
            self._warm += 1
            self.metrics.ready.set(float(self.ready))
        active: object = None  # the LoRAs
        runs: Begun | None = None
        while True:
            # With `offload`, one batch leaves the devices before the next one comes
            batch = [] if runs is not None and pipe.offload else self._next(wait=runs is None)
            if not batch and runs is None:
                return
            begun = None
            if batch:
                start, loras = time.monotonic(), batch[0].settings.loras
                try:
                    if loras != active:
                        active = "unknown"  # until it has succeeded
                        self._choose(pipe, loras)
                        active = loras
                    begun = Begun(batch, self._begin(pipe, batch), start)
                except Exception as error:
                    failed(batch, error)
            if runs is not None:
                self._deliver(runs)
                if begun is not None:
                    begun.since = time.monotonic()
            runs = begun

    def _deliver(self, begun: Begun) -> None:
        """Waits for the images of a batch, and hands them to the threads that write PNGs."""
        try:
            images = list(begun.images)
        except Exception as error:
            return failed(begun.batch, error)
        self._batch_seconds = time.monotonic() - begun.since
        self.metrics.batch_seconds.observe(self._batch_seconds)
        self.metrics.batch_images.observe(len(begun.batch))
        for each, image in zip(begun.batch, images, strict=True):
            self._encoders.submit(self._finish, each, image)

    def _choose(self, pipe: ArcFlowPipeline, loras: Sequence[tuple[str, float]] | None) -> None:
        """Makes these style LoRAs the active ones; None: those of the start."""
        chosen = self.loras if loras is None else dict(loras)
        pipe.set_adapters([self._adapters[name] for name in chosen], list(chosen.values()))

    def _begin(self, pipe: ArcFlowPipeline, batch: Sequence[Waiting]) -> Iterator[Image.Image]:
        """Hands a batch to the devices. The iterator waits for its images."""
        settings = batch[0].settings
        rows, columns = pipe.grid(settings.height, settings.width)
        declared = settings.program in self._programs
        size = min(size for size in self._sizes[: None if declared else 1] if size >= len(batch))
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        seeds = np.array([[each.seed >> 32, each.seed % 2**32] for each in filled], np.uint32)
        numbers = np.array([each.number for each in filled], np.int32)
        channels = pipe.directory.config("transformer").in_channels
        with jax.set_mesh(pipe.mesh):
            noise = noise_of_each(seeds, numbers, tokens=rows * columns, channels=channels)
        given: dict[str, list[Any]] = {}
        if settings.strength is not None or settings.references:
            same = all(each.start is batch[0].start for each in batch)  # it is encoded once
            starts = [each.start for each in (batch[:1] if same else batch) if each.start is not None]
            given["image"] = [list(start.pixels) if settings.references else start.pixels for start in starts]
            if settings.masked:
                given["mask_image"] = [start.repaint for start in starts if start.repaint is not None]
        return pipe.begin([each.prompt for each in batch], noise, **given, **settings.arguments())

    def _finish(self, waiting: Waiting, image: Image.Image) -> None:
        """Gives a client its image."""
        try:
            image.info |= {"image": waiting.number, "seed": waiting.seed} | self._names
            if "loras" in image.info:
                active = dict(waiting.settings.loras or self.loras)
                image.info["loras"] = ", ".join(f"{name}:{strength:g}" for name, strength in active.items() if strength)
            waiting.future.set_result(png(image, FAST))
            self.metrics.images.inc()
        except Exception as error:
            failed([waiting], error)


def failed(batch: Sequence[Waiting], error: Exception) -> None:
    """Tells those who wait for images of a batch that they failed."""
    LOG.error("images failed", exc_info=error)
    for each in batch:
        each.future.set_exception(error)
