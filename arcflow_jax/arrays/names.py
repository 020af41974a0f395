"""Names on disk. The backbone is called `trunk` there, as in the first version of the formats: old files load."""

from __future__ import annotations

from typing import Any

MEMORY, DISK = "backbone", "trunk"


def on_disk(path: str) -> str:
    """A variable's dotted path on disk."""
    return DISK + path.removeprefix(MEMORY) if path.startswith(f"{MEMORY}.") else path


def in_memory(path: str) -> str:
    """The inverse of `on_disk`."""
    return MEMORY + path.removeprefix(DISK) if path.startswith(f"{DISK}.") else path


def tree_on_disk(tree: dict[str, Any]) -> dict[str, Any]:
    """`on_disk` for a nested dict of arrays, whose top-level keys are the first parts of the paths."""
    return {DISK if name == MEMORY else name: value for name, value in tree.items()}


def tree_in_memory(tree: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `tree_on_disk`."""
    return {MEMORY if name == DISK else name: value for name, value in tree.items()}
