"""Names on disk. There the backbone is called `trunk`, as in the first version of the formats: old files load."""

from __future__ import annotations

from typing import Any

MEMORY, DISK = "backbone", "trunk"


def on_disk(path: str) -> str:
    """The dotted path on disk of a variable."""
    return DISK + path.removeprefix(MEMORY) if path.startswith(f"{MEMORY}.") else path


def in_memory(path: str) -> str:
    """`on_disk` undone."""
    return MEMORY + path.removeprefix(DISK) if path.startswith(f"{DISK}.") else path


def tree_on_disk(tree: dict[str, Any]) -> dict[str, Any]:
    """The same for a nested dict of arrays, whose outermost keys are the first parts of the paths."""
    return {DISK if name == MEMORY else name: value for name, value in tree.items()}


def tree_in_memory(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree_on_disk` undone."""
    return {MEMORY if name == DISK else name: value for name, value in tree.items()}
