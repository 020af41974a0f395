"""What Prometheus reads of a server, at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one server.

    Attributes:
      requests: answered requests, by route and status; status 499 is a client that went away.
      request_seconds: from a request for images to its answer.
      images: images that were made.
      cancelled: images that were not made, because nobody waited for them any more.
      batch_images: images in a batch, without those that fill it up.
      batch_seconds: a batch, from prompts to pixels.
      waiting: images in the queue.
      ready: 1 once all programs are compiled.
    """

    def __init__(self, batch_size: int):
        self.registry = CollectorRegistry()
        own = {"namespace": "arcflow", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests.", ["route", "status"], **own)
        self.request_seconds = Histogram(
            "request_seconds", "From a request for images to its answer.", buckets=SECONDS, **own
        )
        self.images = Counter("images", "Images that were made.", **own)
        self.cancelled = Counter("images_cancelled", "Images not made, because nobody waited any more.", **own)
        sizes = [2**i for i in range(batch_size.bit_length()) if 2**i < batch_size]
        self.batch_images = Histogram("batch_images", "Images in a batch.", buckets=[*sizes, batch_size], **own)
        self.batch_seconds = Histogram("batch_seconds", "A batch, from prompts to pixels.", buckets=SECONDS, **own)
        self.waiting = Gauge("waiting_images", "Images in the queue.", **own)
        self.ready = Gauge("ready", "1 once all programs are compiled.", **own)
