"""What TensorBoard would show of a run."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog


def events(run: Path) -> list[Event]:
    """What TensorBoard shows: all events, without those that a later start takes back."""
    kept: list[Event] = []
    for path in sorted((run / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:])):
        data, position = path.read_bytes(), 0
        while position + 12 <= len(data):
            (size,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + size])
            if event.session_log.status == SessionLog.START:
                kept = [other for other in kept if other.step < event.step]
            kept.append(event)
            position += 16 + size
    return kept
