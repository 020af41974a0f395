"""JSON files of ours, rewritten as a program would: with their SHA-256."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arcflow_jax.storage.files import seal


def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Applies an edit to the object in a file."""
    values = json.loads(path.read_text())
    values.pop("sha256", None)
    edit(values)
    path.write_text(json.dumps(values | {"sha256": seal(values)}))
