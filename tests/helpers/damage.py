"""Files with other bytes than were written, in the same number: only what reads the content can tell."""

from __future__ import annotations

from pathlib import Path


def overwrite(file: Path) -> None:
    """Changes the middle third of a file."""
    data = bytearray(file.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(byte ^ 0x5A for byte in data[third : 2 * third])
    file.write_bytes(data)
