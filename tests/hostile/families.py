"""The families of inputs: name → (function that makes a case, share of the cases)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.hostile import (
    embeddings,
    figures,
    images,
    latents,
    models,
    numbers,
    places,
    prompts,
    recipes,
    sources,
    students,
)
from tests.hostile.case import Case

Maker = Callable[[random.Random, Path], Case]

FAMILIES: dict[str, tuple[Maker, int]] = {
    "source-config": (sources.config, 4),
    "source-index": (sources.index, 2),
    "source-weights": (sources.weights, 4),
    "source-files": (sources.files, 3),
    "source-single-file": (sources.single_file, 2),
    "model-json": (models.description, 5),
    "model-checkpoint": (models.checkpoint, 6),
    "model-tokenizer": (models.tokenizer, 4),
    "run-adapter": (students.description, 5),
    "run-checkpoint": (students.checkpoint, 4),
    "run-log": (students.log, 3),
    "released-student": (students.export, 6),
    "embeddings": (embeddings.damaged, 4),
    "prompts": (prompts.texts, 6),
    "prompts-parquet": (prompts.table, 3),
    "prompts-folder": (prompts.places, 3),
    "benchmark": (prompts.benchmark, 3),
    "image": (images.image_file, 7),
    "image-captions": (images.captions, 5),
    "latents": (latents.damaged, 5),
    "override": (recipes.overridden, 10),
    "recipe-file": (recipes.files, 2),
    "run-config": (recipes.stored, 3),
    "settings": (numbers.settings, 5),
    "mesh": (numbers.meshes, 1),
    "command": (numbers.commands, 3),
    "output-place": (places.outputs, 4),
    "full-disk": (places.full_disks, 3),
    "input-place": (places.inputs, 4),
    "hub-id": (places.hub_ids, 3),
    "statistics": (figures.statistics, 4),
    "trajectory": (figures.trajectory, 3),
}
