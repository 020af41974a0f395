"""Images that a client fetches by a link. The link cannot be guessed, and expires."""

from __future__ import annotations

import secrets
import time

LARGEST = 2**28  # bytes of all images; the oldest ones make room


class Images:
    """PNGs in memory, each under a random name, for so many seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._kept: dict[str, tuple[float, bytes]] = {}  # by age

    def keep(self, png: bytes) -> str:
        """The image's name."""
        name = secrets.token_urlsafe(24)
        self._kept[name] = (time.monotonic() + self.seconds, png)
        held = sum(len(kept) for _, kept in self._kept.values())
        for old, (end, kept) in list(self._kept.items()):
            if old == name or (end > time.monotonic() and held <= LARGEST):
                break
            held -= len(kept)
            del self._kept[old]
        return name

    def find(self, name: str) -> bytes | None:
        """The image; None if it has expired, or there was none."""
        end, png = self._kept.get(name, (0.0, b""))
        return png if end > time.monotonic() else None
