"""Converted models: what the converter wrote is what is read, and damage is reported."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from safetensors.numpy import load_file, save_file

from arcflow_jax.arrays import writer
from arcflow_jax.convert.engine import export_tensors
from arcflow_jax.convert.text import t5
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.flow.schedule import Scheduler
from arcflow_jax.models import conversion, model_directory
from arcflow_jax.models.model_directory import ArrayDigest, ModelDirectory, fingerprint
from arcflow_jax.networks.backbones.flux import FluxConfig
from arcflow_jax.networks.states import flatten, nest, unnest
from arcflow_jax.parallel.mesh import make_mesh, state_shardings
from arcflow_jax.storage.bucket import BucketPath
from arcflow_jax.storage.paths import as_path
from tests.helpers.damage import overwrite
from tests.helpers.own_json import rewrite
from tests.helpers.processes import with_devices
from tests.helpers.source_folder import CONFIGS, random_state, write_source

# Unfinished reads would report to a closed event loop
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pytorch") / "tiny"
    write_source(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source) -> Path:
    return conversion.convert_model(source, source.with_name("converted"))


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    """A converted model that a test may damage."""
    return shutil.copytree(converted, tmp_path / "model")


def load(directory: ModelDirectory, component: str, dtype=None) -> nnx.State:
    return directory.load(component, nnx.state(directory.abstract(component, dtype)))


@pytest.mark.parametrize("component", CONFIGS)
def test_weights_come_back(converted, component):
    directory = ModelDirectory.open(converted)
    assert directory.config_json(component) == CONFIGS[component]
    assert directory.dtype(component) == np.float32
    loaded, original = load(directory, component), random_state(component)
    jax.tree.map(np.testing.assert_array_equal, loaded, original)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    for path, variable in flatten(loaded).items():  # logical axes and kinds are the network's, not the file's
        assert type(variable) is type(flatten(original)[path])
        assert variable.axes == flatten(original)[path].axes


def test_a_part_comes_back_alone(converted):
    directory = ModelDirectory.open(converted)
    decoder = nnx.state(directory.abstract("vae").decoder_alone())
    loaded = flatten(directory.load("vae", decoder, part="decoder"))
    whole = {path: x for path, x in flatten(random_state("vae")).items() if path.startswith("decoder.")}
    assert loaded.keys() == whole.keys()
    for path, variable in loaded.items():
        np.testing.assert_array_equal(variable[...], whole[path][...])
    with pytest.raises(UserError, match=r"/vae does not fit the network: .* differ \(encoder"):
        directory.load("vae", decoder)  # unless it is asked for, nothing is left out
    with pytest.raises(UserError, match=r"/vae does not fit the network: .* differ \(decoder"):
        directory.load("vae", decoder, part="encoder")


def test_a_folder_that_must_not_be_read(converted, monkeypatch):
    directory = ModelDirectory.open(converted)

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", refuse)  # tests may run as root, whom no mode of a folder stops
    with pytest.raises(UserError, match=r"^cannot read .*/vae: Permission denied$"):
        load(directory, "vae")


def test_a_tokenizer_that_must_not_be_read(converted, monkeypatch):
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(model_directory, "file_digest", refuse)
    with pytest.raises(UserError, match=r"^cannot read .*/tokenizer/tokenizer_config.json: Permission denied$"):
        ModelDirectory.open(converted).tokenizer("tokenizer")


def test_a_network_runs_on_loaded_weights(converted):
    directory = ModelDirectory.open(converted)
    graphdef, abstract = nnx.split(directory.abstract("text_encoder_2"))
    hidden = nnx.merge(graphdef, directory.load("text_encoder_2", abstract))(jnp.zeros((1, 3), jnp.int32))
    assert hidden.shape == (1, 3, 12)


def test_the_rest_of_the_directory(converted):
    directory = ModelDirectory.open(converted)
    assert isinstance(directory.config("transformer"), FluxConfig)
    assert directory.config("transformer").axes_dims_rope == (2, 2, 4)
    assert directory.scheduler == Scheduler(shift=3.0)
    assert (converted / "tokenizer_2" / "tokenizer_config.json").read_text() == "{}"
    assert not list(converted.parent.glob(".*"))


def test_the_format_is_a_plain_nested_dict(converted):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(converted / "vae" / "state")
    kernel = tree["decoder"]["up_blocks"]["0"]["resnets"]["1"]["conv1"]["kernel"]
    expected = flatten(random_state("vae"))["decoder.up_blocks.0.resnets.1.conv1.kernel"]
    np.testing.assert_array_equal(kernel, expected[...])


@given(st.dictionaries(st.lists(st.sampled_from("ab0"), min_size=1, max_size=3).map(".".join), st.integers()))
def test_nesting(flat):
    leaves = {path: x for path, x in flat.items() if not any(other.startswith(f"{path}.") for other in flat)}
    assert unnest(nest(leaves)) == leaves


def test_chunks_and_the_amount_in_flight_make_no_difference(source, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 2**10)
    monkeypatch.setattr(writer, "IN_FLIGHT_BYTES", 2**8)  # less than the largest layers have
    directory = ModelDirectory.open(conversion.convert_model(source, tmp_path / "out"))
    assert directory.fingerprint == ModelDirectory.open(converted).fingerprint
    jax.tree.map(np.testing.assert_array_equal, load(directory, "transformer"), random_state("transformer"))


@pytest.mark.parametrize(
    ("stored", "asked", "kept"),
    [("float16", None, "float16"), ("bfloat16", None, "bfloat16"), ("float32", "bfloat16", "bfloat16")],
)
def test_dtype(tmp_path, stored, asked, kept):
    write_source(tmp_path / "source", np.dtype(stored))
    directory = ModelDirectory.open(conversion.convert_model(tmp_path / "source", tmp_path / "out", asked))
    assert directory.dtype("transformer") == np.dtype(kept)
    loaded = load(directory, "text_encoder")
    expected = jax.tree.map(lambda x: x.astype(stored).astype(kept), random_state("text_encoder"))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(kept)}
    assert {leaf.dtype for leaf in jax.tree.leaves(load(directory, "text_encoder", jnp.float32))} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize("dtype", ["float64", np.int8, "half"])
def test_a_dtype_that_no_model_has(source, tmp_path, dtype):
    name = dtype if isinstance(dtype, str) else "int8"
    with pytest.raises(UserError, match=f"dtype is '{name}', but has to be 'float32' or 'bfloat16' or 'float16'"):
        conversion.convert_model(source, tmp_path / "out", dtype)
    assert not list(tmp_path.iterdir())


def test_shards_of_several_dtypes(source, tmp_path):
    """float32 holds bfloat16 and float16 exactly, and neither of these the other."""
    mixed = shutil.copytree(source, tmp_path / "source")
    expected = {}
    for shard, dtype in zip(
        sorted((mixed / "text_encoder_2").glob("*.safetensors")), (ml_dtypes.bfloat16, np.float16), strict=True
    ):
        tensors = {name: tensor.astype(dtype) for name, tensor in load_file(shard).items()}
        save_file(tensors, shard)
        expected |= {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    directory = ModelDirectory.open(conversion.convert_model(mixed, tmp_path / "out"))
    assert directory.dtype("text_encoder_2") == np.float32
    exported = export_tensors(t5, load(directory, "text_encoder_2"))
    jax.tree.map(np.testing.assert_array_equal, exported, expected)


@pytest.mark.parametrize("teacher", ["tiny-flux", "tiny-qwen"])
def test_the_bar_ends_where_it_should(tmp_path, monkeypatch, teacher):
    """Also where a part of a tensor is not used, as of Qwen-Image's VAE, which is for video."""
    bars, make = [], conversion.progress_bar

    def kept(**options: bool) -> Progress:
        bars.append(make(**options))
        return bars[-1]

    monkeypatch.setattr(conversion, "progress_bar", kept)
    conversion.convert_model(ASSETS / teacher, tmp_path / "out")
    (bar,) = bars
    assert {task.description: task.completed for task in bar.tasks} == {
        task.description: task.total for task in bar.tasks
    }


def digest(path: str, array: np.ndarray) -> tuple[str, bytes]:
    """Of a whole array."""
    whole = ArrayDigest(path, array.shape, array.dtype)
    whole.update(array)
    return whole.finish()


def test_fingerprint_is_of_the_converted_arrays(converted):
    directory = ModelDirectory.open(converted)
    arrays = {path: np.asarray(variable[...]) for path, variable in flatten(load(directory, "transformer")).items()}
    digests = [digest(path, array) for path, array in arrays.items()]
    assert fingerprint(digests) == directory.fingerprint
    assert fingerprint(reversed(digests)) == directory.fingerprint


def test_fingerprint_tells_all_differences():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    others = {
        "name": digest("b", array),
        "shape": digest("a", array.reshape(3, 2)),
        "dtype": digest("a", array.view(np.int32)),
        "bytes": digest("a", array + 1),
        "bfloat16": digest("a", array.astype(ml_dtypes.bfloat16)),
    }
    assert len({part for _, part in others.values()} | {digest("a", array)[1]}) == 6
    assert digest("a", np.asfortranarray(array)) == digest("a", array)


def test_digest_in_parts():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    parts = ArrayDigest("a", array.shape, array.dtype)
    for layer in array:
        parts.update(layer)
    assert parts.finish() == digest("a", array)


def test_shardings_one_device(converted):
    directory = ModelDirectory.open(converted)
    abstract = nnx.state(directory.abstract("transformer"))
    shardings = state_shardings(make_mesh((1, -1, 1, 1), jax.devices()[:1]), abstract)
    loaded = directory.load("transformer", abstract, shardings)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, loaded)) == jax.tree.leaves(shardings)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert {x.sharding for x in jax.tree.leaves(directory.load("vae", nnx.state(directory.abstract("vae")), one))} == {
        one
    }


def test_weights_are_born_sharded(converted):
    """On two devices, so in a process of its own."""
    program = f"""
import jax
from flax import nnx
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.parallel.mesh import make_mesh, state_shardings
directory = ModelDirectory.open({str(converted)!r})
abstract = nnx.state(directory.abstract("transformer"))
loaded = directory.load("transformer", abstract, state_shardings(make_mesh((1, 2, 1, 1)), abstract))
kernel = loaded["backbone"]["x_embedder"]["kernel"][...]
print(kernel.shape, kernel.addressable_shards[0].data.shape, float(abs(kernel).sum()))
"""
    environment = os.environ | with_devices(2)
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    kernel = flatten(random_state("transformer"))["backbone.x_embedder.kernel"][...]
    shapes, total = run.stdout.rsplit(" ", 1)
    assert shapes == "(16, 16) (16, 8)"
    assert float(total) == pytest.approx(float(abs(kernel).sum()), rel=1e-5)


def describe(model: Path, **changes) -> None:
    rewrite(model / "model.json", lambda values: values.update(changes))


def change_vae(model: Path, name: str, value: object) -> None:
    rewrite(model / "model.json", lambda values: values["components"]["vae"].update({name: value}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model), "does not exist"),
        (lambda model: (model / "model.json").unlink(), "is not a converted model"),
        (lambda model: (model / "model.json").write_text('{"format"'), "not valid JSON"),
        (lambda model: (model / "model.json").write_text("{}"), "is not of arcflow_jax model version 1 or 2, but"),
        (lambda model: describe(model, version=99), "is not of arcflow_jax model version 1 or 2, but of version 99"),
        (lambda model: describe(model, components={}), "is damaged: it lacks text_encoder, text_encoder_2, transf"),
        (lambda model: describe(model, fingerprint="abc"), r"fingerprint is 'abc', but has to be a SHA-256"),
        (lambda model: describe(model, fingerprint="0" * 64), r"fingerprint is not that of components\.transformer"),
        (lambda model: describe(model, files={"../x": 1}), r"files has \.\./x, but has to have paths inside"),
        (lambda model: describe(model, files={"x": -1}), r"model\.json: files\.x is -1, but has to be a whole number"),
        (lambda model: describe(model, checksum=1), "unknown checksum: known are pipeline, components, "),
        (lambda model: describe(model, pipeline="OtherPipeline"), "OtherPipeline, supported are FluxPipeline"),
        (lambda model: change_vae(model, "class", "T5"), r"model\.json: vae is a T5, not a AutoencoderKL"),
        (
            lambda model: change_vae(model, "dtype", None),
            r"components\.vae\.missing dtype, source_dtype or fingerprint",
        ),
    ],
)
def test_open_refuses(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        ModelDirectory.open(copy)


def test_open_says_what_to_do_with_a_pytorch_model(source):
    with pytest.raises(UserError, match=r"run arcflow convert --source .*/tiny --out DIR first"):
        ModelDirectory.open(source)


def largest_file(model: Path) -> Path:
    return max((model / "vae").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is truncated"),
    ],
)
def test_a_damaged_checkpoint_is_refused(copy, damage, message):
    directory = ModelDirectory.open(copy)
    damage(largest_file(copy))
    with pytest.raises(UserError, match=f"/vae is damaged: .*{message}; convert the model again"):
        load(directory, "vae")
    load(directory, "text_encoder")  # the others are whole


def test_a_file_that_was_not_written_is_refused(copy):
    (copy / "vae" / "new").write_text("")
    with pytest.raises(UserError, match=r"/vae is damaged: new is not a file of it"):
        load(ModelDirectory.open(copy), "vae")


def test_overwritten_bytes_are_refused(tiny_flux, tmp_path):
    """In each kind of file of a checkpoint; and nothing but our one line is printed.

    Not of the smallest models: most of their bytes are an index that TensorStore has written anew elsewhere.
    """
    program = """
import sys
from flax import nnx
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.models.model_directory import ModelDirectory
for path in sys.argv[1:]:
    directory = ModelDirectory.open(path)
    try:
        directory.load("vae", nnx.state(directory.abstract("vae")))
        print("loaded")
    except UserError as error:
        print(error)
"""
    state = tiny_flux / "vae" / "state"
    values, index = (
        max((state / folder).iterdir(), key=lambda file: file.stat().st_size) for folder in ("ocdbt.process_0/d", "d")
    )
    damaged = []
    for file in (values, index, state / "manifest.ocdbt", state / "_METADATA"):
        damaged.append(shutil.copytree(tiny_flux, tmp_path / str(len(damaged))))
        overwrite(damaged[-1] / file.relative_to(tiny_flux))
    done = subprocess.run([sys.executable, "-c", program, *damaged], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for line, path in zip(lines, damaged, strict=True):
        assert re.fullmatch(rf"{path}/vae is damaged: .*; convert the model again", line)


def test_a_bucket_is_asked_for_all_files_at_once(converted, monkeypatch):
    """Not for each of them, of which a large model has hundreds."""
    description = ModelDirectory.open(converted).description
    sizes = {name: size for name, size in description.files.items() if name.startswith("vae/")}
    there = as_path("gs://bucket/model")

    def asked(path: BucketPath) -> None:
        raise AssertionError(f"asked for {path} alone")

    monkeypatch.setattr(BucketPath, "info", asked)
    monkeypatch.setattr(BucketPath, "sizes", lambda path: {there / name: size for name, size in sizes.items()})
    directory = ModelDirectory(there, description)
    directory.check_files("vae")
    sizes["vae/state/_METADATA"] -= 1
    with pytest.raises(UserError, match="/vae is damaged: vae/state/_METADATA is truncated"):
        directory.check_files("vae")
    sizes |= {"vae/state/_METADATA": description.files["vae/state/_METADATA"], "vae/new": 1}
    with pytest.raises(UserError, match="/vae is damaged: new is not a file of it"):
        directory.check_files("vae")


@pytest.mark.parametrize("layers", [1, 5])
def test_weights_that_do_not_fit_the_config(copy, layers):
    directory = ModelDirectory.open(copy)
    directory.config_json("transformer")["num_single_layers"] = layers
    with pytest.raises(UserError, match=r"/transformer does not fit the network: 14 differ \(backbone.single"):
        load(directory, "transformer")
