"""The cache of text embeddings: training from it is training on the fly, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from arcflow_jax.data.embeddings import read_shard, shard_path, write_shard
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.families.flux import FluxPrompts
from arcflow_jax.flow.distill import distil
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.training import embeddings, loop, state
from arcflow_jax.training.embeddings import CachedPrompts, embed_prompts
from arcflow_jax.training.recipe import Recipe
from tests.helpers.own_json import rewrite
from tests.helpers.tiny_run import losses, recipe

LONG = "a ring " * 20  # 41 tokens, of which the bundled T5 takes 16
LINES = ["a red circle", "", "a green square", LONG, "a blue ring", "a red circle", "a large triangle", "a ring"]
PROMPTS = ["a red circle", "a green square", LONG.strip(), "a blue ring", "a large triangle", "a ring"]


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    return shutil.copytree(tiny_flux, tmp_path_factory.mktemp("model") / "teacher")


def small(model: Path, out: Path, **changes: Any) -> Recipe:
    """Three training steps of two resolutions, on LINES."""
    made = recipe(model, out)
    Path(made.prompts).write_text("\n".join(LINES))
    # No other test has traced its programs, though the prompt is for CFG, and compiled they are those of others
    distillation = dataclasses.replace(made.distillation, negative_prompt="not used")
    return dataclasses.replace(
        made, **{"distillation": distillation, "resolutions": ((32, 32), (32, 48)), "steps": 3} | changes
    )


@pytest.fixture(scope="module")
def cache(model, tmp_path_factory) -> Path:
    """The embeddings of PROMPTS, in shards of four."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(embeddings, "SHARD", 4)
        folder = tmp_path_factory.mktemp("cache")
        return embed_prompts(small(model, folder / "run"), folder / "embeddings")


@pytest.mark.slow
def test_training_from_a_cache_is_training_on_the_fly(model, cache, tmp_path, monkeypatch, capfd):
    compiled = []

    def counted(student, adapter, teacher, noise, *args, **settings):
        compiled.append(noise.shape[1])
        return distil(student, adapter, teacher, noise, *args, **settings)

    monkeypatch.setattr(state, "distil", counted)
    fly = loop.train(small(model, tmp_path / "fly"))
    assert sorted(compiled) == [4, 6]  # tokens: each resolution once
    out = capfd.readouterr().out
    assert f"7 prompts from {tmp_path / 'prompts.txt'}, 1 empty ones left out" in out

    def no_encoders(*args: object) -> None:
        raise AssertionError("the encoders were loaded")

    monkeypatch.setattr(FluxPrompts, "__init__", no_encoders)
    cached = loop.train(small(model, tmp_path / "cached", embeddings=str(cache)))
    np.testing.assert_allclose(losses(cached), losses(fly), rtol=1e-5)
    assert np.ptp(losses(fly)) > 1e-3  # of different batches

    cut = [[json.loads(line)["prompts_cut"] for line in (run / "log.jsonl").open()] for run in (fly, cached)]
    # Twenty-four draws out of seven prompts are three rounds and three more
    assert cut[0] == cut[1] == sorted(cut[0])
    assert cut[0][-1] in (3, 4)
    assert f"{cut[0][-1]} prompts had more tokens than the text encoder takes, and were cut" in out


def test_conditioning_is_that_of_the_encoders(model, cache):
    directory, mesh = ModelDirectory.open(model), make_mesh((1, 1, 1, 1))
    prompts = ["a ring", LONG.strip(), "a red circle", "a ring"]
    fly, cached = FluxPrompts(directory, "float32", mesh), CachedPrompts(cache, directory, "float32", mesh, prompts)
    settings = {"guidance": 2.0, "rows": 2, "columns": 3}
    ours, theirs = cached(prompts, **settings), fly(prompts, **settings)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert (cached.cut, fly.cut) == (1, 1)


class Encoders:
    """`FluxPrompts` with a record of what it was asked for."""

    def __init__(self, patched: pytest.MonkeyPatch):
        self.asked: list[list[str]] = []
        embed = FluxPrompts.embed

        def recorded(encode: FluxPrompts, prompts: Sequence[str]) -> Any:
            self.asked.append(list(prompts))
            return embed(encode, prompts)

        patched.setattr(FluxPrompts, "embed", recorded)


def test_an_interrupted_cache_is_resumed(model, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD", 4)
    encoders = Encoders(monkeypatch)
    settings = small(model, tmp_path / "run")

    def killed(path: Path, arrays: dict[str, np.ndarray]) -> None:
        if path.name == "shard-00001.safetensors":
            path.with_name(f".{path.name}.0123456789abcdef.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write_shard(path, arrays)

    with monkeypatch.context() as patched:
        patched.setattr(embeddings, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            embed_prompts(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first, second = [*PROMPTS[:4], *[PROMPTS[3]] * 4], [*PROMPTS[4:], *[PROMPTS[5]] * 6]  # filled up to a batch
    assert encoders.asked == [first, second]

    others = dataclasses.replace(settings, prompts=str(ASSETS / "shapes" / "prompts-test.txt"))
    with pytest.raises(UserError, match=r"\.out\.incomplete is an unfinished cache of other prompts or text encoders"):
        embed_prompts(others, tmp_path / "out")

    encoders.asked.clear()
    embed_prompts(settings, tmp_path / "out")
    assert encoders.asked == [second]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(file.name for file in cache.iterdir())
    for file in cache.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (tmp_path / ".out.incomplete").exists()
    with pytest.raises(UserError, match="exists already"):
        embed_prompts(settings, tmp_path / "out")


def test_a_full_disk_is_told_before_it_is_full(model, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD", 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"it needs 0\.00 GB, but only 0\.00 GB are free"):
        embed_prompts(small(model, tmp_path / "run"), tmp_path / "out")


def test_arrays_are_kept_as_they_are(tmp_path):
    text = np.arange(24, dtype=np.float32).reshape(2, 3, 4).astype(ml_dtypes.bfloat16) / 7
    arrays = {
        "text": text,
        "cut": np.array([True, False]),
        "prompts": np.frombuffer("línea中a fox".encode(), np.uint8),
        "prompt_ends": np.array([9, 14]),
    }
    write_shard(tmp_path / "shard.safetensors", arrays)
    tensors, texts = read_shard(tmp_path / "shard.safetensors")
    assert texts == ["línea中", "a fox"]
    assert tensors.keys() == {"text", "cut", "checksums"}
    assert tensors["cut"].tolist() == [True, False]
    read = np.asarray(tensors["text"][1:2])
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.view(np.uint16), text[1:2].view(np.uint16))


def test_the_door(model, cache, tmp_path):
    directory, mesh = ModelDirectory.open(model), make_mesh((1, 1, 1, 1))

    def refused(message: str, folder: Path = cache, dtype: str = "float32", prompts: Sequence[str] = PROMPTS) -> None:
        with pytest.raises(UserError, match=message) as caught:
            CachedPrompts(folder, directory, dtype, mesh, prompts)
        assert "\n" not in str(caught.value)

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(cache, tmp_path / name))

    encode = CachedPrompts(cache, directory, "float32", mesh, PROMPTS[::-1])
    with pytest.raises(UserError, match="lack 1 of the prompts, the first is 'a fox'"):
        encode(["a ring", "a fox"], guidance=2.0, rows=2, columns=2)
    refused("lack 2 of the prompts, the first is 'a fox': run arcflow embed-prompts", prompts=["a ring", "a fox", "b"])
    refused("are float32, the recipe computes in bfloat16: embed the prompts again", dtype="bfloat16")
    refused(r"holds no embeddings: it has no embeddings\.json", tmp_path)
    refused("holds no embeddings", tmp_path / "nowhere")
    short = damaged("short")
    shard_path(short, 1).write_bytes(shard_path(cache, 1).read_bytes()[:-100])
    refused(r"shard-00001\.safetensors is truncated or corrupt: it ends before", short)
    count = damaged("count")
    rewrite(count / "embeddings.json", lambda values: values.update(shard=values["shard"] + 1))
    refused(r"shard-00000\.safetensors is damaged: it has 4 prompts, but embeddings\.json says 5", count)
    gone = damaged("gone")
    shard_path(gone, 0).unlink()
    refused(r"shard-00000\.safetensors is missing", gone)

    # Other weights, and the same weights behind another tokenizer
    description = ModelDirectory.open(model).description

    def with_fingerprint(of_t5: str | None) -> ModelDirectory:
        t5 = dataclasses.replace(description.components["text_encoder_2"], fingerprint=of_t5, stored=None)
        components = description.components | {"text_encoder_2": t5}
        return ModelDirectory(model, dataclasses.replace(description, components=components))

    directory = with_fingerprint("0" * 64)
    refused("are of other text encoders than those of")
    directory = with_fingerprint(None)
    refused("keeps no fingerprint of its text_encoder_2: convert the model again")
    retokenized = tmp_path / "model"
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(model / name, retokenized / name)
    directory = ModelDirectory(retokenized, description)
    CachedPrompts(cache, directory, "float32", mesh, PROMPTS)
    with (retokenized / "tokenizer_2" / "tokenizer.json").open("a") as file:
        file.write(" ")
    refused("are of other text encoders than those of")
