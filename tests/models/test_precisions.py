"""One base in several precisions: one fingerprint, adapters that fit all of them, and old model directories."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from arcflow_jax.checkpoints.training import AdapterDescription, Checkpoints
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.states import flatten, nest, unnest
from arcflow_jax.networks.student import AdapterConfig, split_model
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.embeddings import encoders_fingerprint
from tests.helpers.own_json import rewrite
from tests.helpers.source_folder import random_state, write_source

ADAPTER = AdapterConfig(modes=3, rank=2, alpha=2.0, dropout=0.0, targets=("single_transformer_blocks.proj_mlp",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("precisions")


@pytest.fixture(scope="module")
def source(folder) -> Path:
    """In float32."""
    write_source(folder / "source")
    return folder / "source"


@pytest.fixture(scope="module")
def full(source) -> ModelDirectory:
    return ModelDirectory.open(convert_model(source, source.with_name("full")))


@pytest.fixture(scope="module")
def half(source) -> ModelDirectory:
    return ModelDirectory.open(convert_model(source, source.with_name("half"), "bfloat16"))


def fingerprints(directory: ModelDirectory) -> list[str]:
    components = directory.description.components.values()
    return [directory.fingerprint, *(component.fingerprint for component in components)]


def test_two_precisions_of_a_source_share_their_fingerprints(full, half):
    assert (full.dtype("transformer"), half.dtype("transformer")) == (np.float32, ml_dtypes.bfloat16)
    assert fingerprints(full) == fingerprints(half)


def test_two_sources_have_their_own_fingerprints(full, folder):
    """Rounding a source makes another one: which of them a bfloat16 model came from is not known."""
    write_source(folder / "rounded", ml_dtypes.bfloat16)
    rounded = ModelDirectory.open(convert_model(folder / "rounded", folder / "rounded_model"))
    assert not set(fingerprints(full)) & set(fingerprints(rounded))
    again = ModelDirectory.open(convert_model(folder / "rounded", folder / "again", "float32"))
    assert fingerprints(again) == fingerprints(rounded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_conversion_has_the_fingerprint_of_the_first_version(folder, dtype):
    """SHA-256 over the sorted names of the arrays as stored, each array hashed with name, shape and dtype."""
    write_source(folder / dtype, np.dtype(dtype))
    directory = ModelDirectory.open(convert_model(folder / dtype, folder / f"{dtype}_model"))
    parts = []
    for path, variable in flatten(random_state("transformer")).items():
        name = f"trunk.{path.removeprefix('backbone.')}" if path.startswith("backbone.") else path
        array = np.asarray(variable[...]).astype(dtype)
        header = f"{name} {array.shape} {dtype}\n".encode()
        parts.append((name, hashlib.sha256(header + array.tobytes()).digest()))
    expected = hashlib.sha256(b"".join(part for _, part in sorted(parts))).hexdigest()
    assert directory.fingerprint == expected


def test_embeddings_tell_stored_precisions_apart(full, half, folder):
    assert encoders_fingerprint(full) != encoders_fingerprint(half)
    same = ModelDirectory.open(convert_model(folder / "source", folder / "same", "float32"))
    assert encoders_fingerprint(same) == encoders_fingerprint(full)


def save_student(directory: ModelDirectory, run: Path) -> Path:
    """A student with random weights of a base."""
    run.mkdir()
    AdapterDescription(directory.fingerprint, ADAPTER, Distillation(), guidance=2.0).write(run)
    _, _, abstract = split_model(directory.student(ADAPTER, jnp.float32))
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), abstract)
    with Checkpoints(run) as checkpoints:
        checkpoints.save_ema(adapter)
    return run


@pytest.mark.slow
def test_an_adapter_samples_on_another_precision_of_its_base(tmp_path):
    full = convert_model(ASSETS / "tiny-flux", tmp_path / "full", "float32")
    half = convert_model(ASSETS / "tiny-flux", tmp_path / "half", "bfloat16")
    run = save_student(ModelDirectory.open(full), tmp_path / "run")
    images = []
    for model in (full, half):
        pipeline = ArcFlowPipeline.from_pretrained(model, adapter=run)
        noise = pipeline.noise(0, 1, 2, 2)
        conditioning = pipeline.encode(["a red circle"], guidance=2.0, rows=2, columns=2)
        images.append(np.asarray(pipeline.denoise(noise, conditioning, 2)))
    difference = np.linalg.norm(images[0] - images[1]) / np.linalg.norm(images[0])
    assert 0 < difference < 0.1  # the base's rounding

    def another(values: dict) -> None:
        values["fingerprint"] = values["components"]["transformer"]["fingerprint"] = "1" * 64

    rewrite(half / "model.json", another)
    with pytest.raises(UserError, match=r"was trained on base [0-9a-f]{12}…, this model is 111111111111…"):
        ArcFlowPipeline.from_pretrained(half, adapter=run)


def test_model_directory_of_the_first_version(full, tmp_path):
    """The backbone's arrays were called `trunk.…`, and model.json had no source dtypes."""
    old = shutil.copytree(full.path, tmp_path / "old")
    arrays = {path: np.asarray(variable[...]) for path, variable in flatten(random_state("transformer")).items()}
    named = {path.replace("backbone.", "trunk.", 1): array for path, array in arrays.items()}
    state = old / "transformer" / "state"
    shutil.rmtree(state)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(state, nest(named))
    description = json.loads((old / "model.json").read_text())
    del description["sha256"], description["tokenizers"]
    description["version"] = 1
    for component in description["components"].values():
        del component["source_dtype"], component["stored"]
    files = [file for file in sorted(old.rglob("*")) if file.is_file() and file.name != "model.json"]
    description["files"] = {file.relative_to(old).as_posix(): file.stat().st_size for file in files}
    (old / "model.json").write_text(json.dumps(description))

    directory = ModelDirectory.open(old)
    loaded = directory.load("transformer", nnx.state(directory.abstract("transformer")))
    for path, variable in flatten(loaded).items():
        np.testing.assert_array_equal(variable[...], arrays[path], err_msg=path)
    assert encoders_fingerprint(directory) == encoders_fingerprint(full)


def test_the_converter_writes_the_names_of_the_first_version(full):
    with ocp.PyTreeCheckpointer() as checkpointer:
        names = unnest(checkpointer.restore(full.path / "transformer" / "state"))
    assert {name.partition(".")[0] for name in names} == {"trunk", "output"}
