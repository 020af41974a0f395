"""Damaged caches of text embeddings."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np

from arcflow_jax.data.embeddings import FORMAT, VERSION, CacheDescription, write_shard
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.storage.files import digest, write_own
from arcflow_jax.training.embeddings import CachedPrompts, encoders_fingerprint
from tests.hostile import good, mutate, tensors
from tests.hostile.case import Case


@functools.cache
def cache() -> Path:
    """Random embeddings of the good prompts, three to a shard. In the layout that `embed_prompts` writes."""
    import arcflow_jax.training.embeddings as writer

    class Encode:
        def embed(self, prompts: list[str]) -> Any:
            rng = np.random.default_rng(len(prompts[0]))
            arrays = {
                "text": rng.standard_normal((len(prompts), 8, 12)),
                "pooled": rng.standard_normal((len(prompts), 10)),
            }
            return {name: x.astype(np.float32) for name, x in arrays.items()}, np.zeros(len(prompts), bool)

    folder = good.root() / "embeddings"
    folder.mkdir()
    shards = {f"shard-{i:05d}.safetensors": good.PROMPTS[3 * i : 3 * i + 3] for i in range(2)}
    for name, prompts in shards.items():
        write_shard(folder / name, writer.embed_shard(Encode(), prompts, 2))
    encoders = encoders_fingerprint(good.directory("flux"))
    description = CacheDescription(encoders, "float32", 4, 3, digest(good.PROMPTS))
    write_own(folder / "embeddings.json", description, FORMAT, VERSION)
    return folder


def use(folder: Path) -> list[np.ndarray]:
    """The conditioning of each prompt, as training reads it."""
    mesh = make_mesh((1, -1, 1, 1))
    cached = CachedPrompts(folder, good.directory("flux"), "float32", mesh, good.PROMPTS)
    made = [cached([prompt], guidance=3.5, rows=2, columns=2) for prompt in good.PROMPTS]
    return [np.asarray(x) for x in jax.tree.leaves(made)]


@functools.cache
def best() -> list[np.ndarray]:
    return use(cache())


def damaged(rng: random.Random, folder: Path) -> Case:
    """embeddings.json, or a shard."""
    copy = good.copy(cache(), folder / "in" / "cache")
    file = rng.choice(sorted(copy.iterdir()))
    before = file.read_bytes()
    if rng.random() < 0.15:
        what = mutate.odd_file(rng, file)
    elif file.suffix == ".json":
        damage = mutate.json_value(rng, json.loads(before))
        good.put_own(rng, file, damage.text)
        what = damage.what
    else:
        data, what = tensors.damaged(rng, before)
        good.put(file, data)

    def wrong(result: list[np.ndarray]) -> str | None:
        return None if good.same_arrays(result, best()) else "the embeddings are others"

    return Case(f"{file.name}: {what}", lambda: use(copy), [str(copy)], wrong, folder / "in", folder / "work")
