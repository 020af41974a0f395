"""The families of inputs: name → (function that makes a case, share of the cases)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.hostile import embeddings, models, sources, students
from tests.hostile.case import Case

Maker = Callable[[random.Random, Path], Case]

FAMILIES: dict[str, tuple[Maker, int]] = {
    "source-config": (sources.config, 4),
    "source-index": (sources.index, 2),
    "source-weights": (sources.weights, 4),
    "source-files": (sources.files, 3),
    "model-json": (models.description, 5),
    "model-checkpoint": (models.checkpoint, 6),
    "model-tokenizer": (models.tokenizer, 4),
    "run-adapter": (students.description, 5),
    "run-checkpoint": (students.checkpoint, 4),
    "run-log": (students.log, 3),
    "released-student": (students.export, 6),
    "embeddings": (embeddings.damaged, 4),
}
