"""The families of inputs: name → (function that makes a case, share of the cases)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.hostile import sources
from tests.hostile.case import Case

Maker = Callable[[random.Random, Path], Case]

FAMILIES: dict[str, tuple[Maker, int]] = {
    "source-config": (sources.config, 4),
    "source-index": (sources.index, 2),
    "source-weights": (sources.weights, 4),
    "source-files": (sources.files, 3),
}
