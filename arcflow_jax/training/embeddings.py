"""Precomputed text embeddings: writes a cache, and reads it in place of the text encoders."""

# P prompts of a shard

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from arcflow_jax import schema
from arcflow_jax.console import progress_bar
from arcflow_jax.data.embeddings import (
    DESCRIPTION,
    FORMAT,
    SHARD,
    VERSION,
    CacheDescription,
    checked_row,
    read_cache,
    shard_path,
    write_shard,
)
from arcflow_jax.errors import UserError
from arcflow_jax.models.model_cache import converted
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.parallel.processes import from_rows, is_main, several
from arcflow_jax.parallel.together import (
    check_directory,
    check_same,
    from_first,
    own_share,
    wait_for_all,
    writing_together,
)
from arcflow_jax.storage.atomic import cannot_write, check_room, finish, unfinished
from arcflow_jax.storage.files import digest, file_digest, read_own, write_own
from arcflow_jax.storage.paths import UNFINISHED, as_path
from arcflow_jax.storage.safetensors import read_header
from arcflow_jax.training.plan import encoders, examples, training_mesh
from arcflow_jax.training.recipe import Recipe


def encoders_fingerprint(directory: ModelDirectory) -> str:
    """SHA-256 over the weights and tokenizers of a model's text encoders.

    Raises:
      UserError: if the model was converted by a version that kept no fingerprints of text encoders.
    """
    sha = hashlib.sha256()
    for component, tokenizer in directory.family.prompts.ENCODERS.items():
        stored = directory.description.components[component]
        if stored.fingerprint is None:
            raise UserError(f"{directory.path} keeps no fingerprint of its {component}: convert the model again")
        # The fingerprint is of the source's values. Weights stored in another dtype, or quantized, give slightly other
        # embeddings
        rounded = f" {stored.dtype}" if stored.source_dtype not in (None, stored.dtype) else ""
        rounded += f" {stored.quantization.format}" if stored.quantization else ""
        sha.update(f"{component} {stored.fingerprint}{rounded}\n".encode())
        for file in sorted((directory.path / tokenizer).iterdir()):
            if file.is_file():
                sha.update(f"{tokenizer}/{file.name} {file_digest(file)}\n".encode())
    return sha.hexdigest()


def embed_prompts(recipe: Recipe, out: Path) -> Path:
    """Writes the embeddings of all prompts that a recipe's run encodes, each once, to the directory `out`.

    An interrupted call leaves what it has written in a directory beside `out`, and the next call resumes from it. `out`
    appears at the end, complete, or not at all. Several processes share the shards.

    Raises:
      UserError: if the prompts or the model do not fit the recipe, `out` exists or cannot be written, or an
        unfinished cache beside it is of other prompts or text encoders.
    """
    out = as_path(out).absolute()
    with writing_together(out, DESCRIPTION):
        cut = write_cache(recipe, out)
    if cut and is_main():
        print(f"{cut} prompts had more tokens than the text encoder takes, and were cut", flush=True)
    return out


def write_cache(recipe: Recipe, out: Path) -> int:
    """`embed_prompts`, by the one writer of `out`. Returns how many prompts were cut."""
    directory = ModelDirectory.open(converted(recipe.model))
    if several():  # the recipe's mesh is one of all devices, but here each process has its own
        recipe = dataclasses.replace(recipe, mesh="auto")
    held = {"text encoders": encoders(directory, recipe.dtype)}
    mesh = training_mesh(recipe, directory, held, jax.local_devices())
    found, _ = examples(recipe, directory)
    if is_main():
        print(found, flush=True)
    prompts = list(dict.fromkeys([*found.texts, *recipe.other_prompts]))
    description = CacheDescription(encoders_fingerprint(directory), recipe.dtype, len(prompts), SHARD, digest(prompts))
    check_same({"the prompts or the model": schema.unparse(description)})
    shards = [prompts[i : i + SHARD] for i in range(0, len(prompts), SHARD)]
    aside = unfinished(out)
    paths = [shard_path(aside, i) for i in range(len(shards))]
    with cannot_write(out):
        if is_main():
            begin_cache(aside, description)
        check_directory(aside)
        missing = from_first(lambda: [i for i, path in enumerate(paths) if not path.exists()])
        if missing:
            encode = directory.family.prompts(directory, recipe.dtype, mesh)
            own = [missing[i] for i in own_share(len(missing))]
            write_shards({paths[i]: shards[i] for i in own}, encode, recipe.batch)
        wait_for_all()
        return from_first(lambda: end_cache(out, paths, description))


def end_cache(out: Path, paths: Sequence[Path], description: CacheDescription) -> int:
    """Makes `out` of its shards. Returns how many prompts were cut."""
    cut = sum(int(np.asarray(read_header(path)["cut"]).sum()) for path in paths)
    write_own(unfinished(out) / DESCRIPTION, description, FORMAT, VERSION)
    finish(out)
    return cut


def begin_cache(aside: Path, description: CacheDescription) -> None:
    """Makes the directory that a cache is written to, or checks that an unfinished one there is of the same prompts."""
    begun = aside / UNFINISHED
    if begun.exists() and read_own(CacheDescription, begun, FORMAT, VERSION) == description:
        return
    if begun.exists() or (aside.exists() and any(aside.iterdir())):
        raise UserError(
            f"{aside} is an unfinished cache of other prompts or text encoders: remove it, or name another --out"
        )
    aside.mkdir(parents=True, exist_ok=True)
    write_own(begun, description, FORMAT, VERSION)


def write_shards(shards: Mapping[Path, Sequence[str]], encode: Any, batch: int) -> None:
    """Writes this process's shards of prompts, one after the other.

    Raises:
      UserError: before the first is written, if the disk has no room for all.
    """
    done, total = 0, sum(map(len, shards.values()))
    with progress_bar(disable=not is_main()) as progress:
        task = progress.add_task("embedding", total=total, text="")
        for i, (path, prompts) in enumerate(shards.items()):
            arrays = embed_shard(encode, prompts, batch)
            if i == 0:
                check_room(path, len(shards) * sum(array.nbytes for array in arrays.values()))
            write_shard(path, arrays)
            done += len(prompts)
            progress.update(task, completed=done)
            if is_main() and not progress.console.is_terminal:  # a log file, CI
                print(f"embedded {done} of {total} prompts", flush=True)


def embed_shard(encode: Any, prompts: Sequence[str], batch: int) -> dict[str, np.ndarray]:
    """The arrays of a shard, [P, ...]. All batches have the same size, so that the text encoders are compiled once."""
    parts = []
    for first in range(0, len(prompts), batch):
        some = list(prompts[first : first + batch])
        embedded, cut = encode.embed(some + some[-1:] * (batch - len(some)))
        parts.append({name: np.asarray(x)[: len(some)] for name, x in (embedded | {"cut": cut}).items()})
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    texts = [prompt.encode() for prompt in prompts]
    arrays["prompts"] = np.frombuffer(b"".join(texts), np.uint8)
    arrays["prompt_ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return arrays


class CachedPrompts:
    """Turns prompts into conditioning like a family's `PromptEncoder`, with embeddings from a cache.

    Args:
      folder: of the cache.
      directory: the model.
      dtype: of the recipe.
      mesh: that the batch is sharded over.
      prompts: all that the run will need.

    Attributes:
      cut: as of `PromptEncoder`.

    Raises:
      UserError: if the cache is missing, unfinished or damaged, was made by other text encoders or in another dtype,
        or lacks a prompt.
    """

    def __init__(self, folder: str | Path, directory: ModelDirectory, dtype: str, mesh: Mesh, prompts: Iterable[str]):
        self.folder, self.directory, self.mesh = as_path(folder), directory, mesh
        description, self.shards, texts = read_cache(self.folder)
        if description.encoders != encoders_fingerprint(directory):
            raise UserError(f"the embeddings in {folder} are of other text encoders than those of {directory.path}")
        if description.dtype != dtype:
            raise UserError(
                f"the embeddings in {folder} are {description.dtype}, the recipe computes in {dtype}: embed the "
                f"prompts again with --config.dtype={dtype}"
            )
        # Shard and row of each prompt
        self.rows = {text: divmod(i, description.shard) for i, text in enumerate(texts)}
        self.check(prompts)
        self.cut = 0
        self._read = functools.lru_cache(maxsize=4)(self._read_rows)

    def check(self, prompts: Iterable[str]) -> None:
        """Raises UserError unless the cache has all these prompts."""
        missing = [prompt for prompt in prompts if prompt not in self.rows]
        if missing:
            raise UserError(
                f"the embeddings in {self.folder} lack {len(missing)} of the prompts, the first is "
                f"{missing[0][:60]!r}: run arcflow embed-prompts on them"
            )

    def prepare(self, prompts: Sequence[str]) -> None:
        """Reads the embeddings of a batch, so that the call with the same prompts finds them read."""
        self._read(tuple(prompts))

    def _read_rows(self, prompts: tuple[str, ...]) -> dict[str, np.ndarray]:
        self.check(prompts)
        found = [checked_row(self.shards[i], row, shard_path(self.folder, i)) for i, row in map(self.rows.get, prompts)]
        return {name: np.concatenate([row[name] for row in found]) for name in found[0]}

    def __call__(self, prompts: Sequence[str], *, guidance: float, rows: int, columns: int) -> Any:
        """Conditioning of B prompts for images of rows × columns tokens. Raises UserError if the cache lacks one."""
        arrays = self._read(tuple(prompts))
        self.cut += int(arrays["cut"].sum())
        embedded = {name: from_rows(x, self.mesh) for name, x in arrays.items() if name != "cut"}
        conditioning = self.directory.family.prompts.conditioning
        return conditioning(self.directory, self.mesh, embedded, guidance=guidance, rows=rows, columns=columns)
