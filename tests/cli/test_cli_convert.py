"""`arcflow convert`: what it prints, its exit codes, and that it leaves no partial output."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from arcflow_jax.cli.app import main
from arcflow_jax.convert import engine
from arcflow_jax.models import conversion
from arcflow_jax.models.model_directory import ModelDirectory
from tests.helpers.source_folder import CONFIGS, weights_file, write_source

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pytorch") / "source"
    write_source(folder)
    return folder


@pytest.fixture
def source(whole, tmp_path) -> Path:
    """A source folder that a test may damage, in a directory of its own."""
    return shutil.copytree(whole, tmp_path / "source")


def convert(capfd, source: Path, out: Path, *options: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--source", str(source), "--out", str(out), *options])
    return caught.value.code or 0, *capfd.readouterr()


def assert_refused(capfd, source: Path, out: Path, message: str) -> None:
    """Exit code 2, one line on stderr that matches, and nothing new on the disk."""
    before = sorted(out.parent.rglob("*"))
    code, stdout, stderr = convert(capfd, source, out)
    assert (code, stdout) == (2, "")
    assert re.fullmatch(r"error: .*\n", stderr)
    assert re.search(message, stderr), stderr
    assert sorted(out.parent.rglob("*")) == before


def test_converts(capfd, source, tmp_path):
    code, stdout, stderr = convert(capfd, source, tmp_path / "new" / "out", "--dtype", "bfloat16")
    assert (code, stdout, stderr) == (0, f"converted {source} to {tmp_path / 'new' / 'out'}\n", "")
    assert ModelDirectory.open(tmp_path / "new" / "out").dtype("vae") == ml_dtypes.bfloat16
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def edit(path: Path, **changes) -> None:
    """Changes entries of a JSON file, and removes those that are None."""
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


def change(source: Path, component: str, tensors) -> None:
    """Changes tensors of a component, and removes those that are None."""
    file = weights_file(source, component)
    changed = load_file(file) | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file)


def only_pickles(source: Path) -> None:
    weights_file(source, "vae").unlink()
    (source / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def swap_in_index(source: Path) -> None:
    """Says of one T5 tensor that it lies in the other shard."""
    path = source / "text_encoder_2" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = index["weight_map"]
    files["shared.weight"] = next(file for file in files.values() if file != files["shared.weight"])
    path.write_text(json.dumps(index))


ONES = np.ones(10, np.float32)
DAMAGE = {
    "no source": (shutil.rmtree, r"source folder .* does not exist"),
    "not a diffusers folder": (lambda s: (s / "model_index.json").unlink(), r"no model_index.json"),
    "another pipeline": (
        lambda s: edit(s / "model_index.json", _class_name="PixArtPipeline"),
        r"is a PixArtPipeline, supported are FluxPipeline",
    ),
    "another encoder": (
        lambda s: edit(s / "model_index.json", text_encoder=["transformers", "BertModel"]),
        r"text_encoder as \['transformers', 'BertModel'\], expected CLIPTextModel",
    ),
    "an unknown component": (
        lambda s: edit(s / "model_index.json", image_encoder=["transformers", "CLIPVisionModel"]),
        r"image_encoder .* is not supported",
    ),
    "missing component": (lambda s: shutil.rmtree(s / "vae"), r"component folder .*/vae is missing"),
    "missing tokenizer": (lambda s: shutil.rmtree(s / "tokenizer_2"), r"component folder .*/tokenizer_2 is missing"),
    "missing weights": (lambda s: weights_file(s, "vae").unlink(), r"/vae holds no weights"),
    "missing scheduler": (lambda s: shutil.rmtree(s / "scheduler"), r"scheduler_config.json is missing"),
    "missing config": (lambda s: (s / "transformer" / "config.json").unlink(), r"transformer/config.json is missing"),
    "broken config": (lambda s: truncate(s / "vae" / "config.json"), r"vae/config.json is not valid JSON"),
    "incomplete config": (
        lambda s: edit(s / "transformer" / "config.json", num_layers=None),
        r"transformer/config.json: missing num_layers",
    ),
    "senseless config": (
        lambda s: edit(s / "transformer" / "config.json", num_layers="two"),
        r"transformer/config.json: num_layers is 'two', but has to be a whole number",
    ),
    "layers without end": (  # nothing may be built from it
        lambda s: edit(s / "transformer" / "config.json", num_layers=10**12),
        r"config.json: num_layers is 1000000000000, but has to be a whole number from 1 to 1000$",
    ),
    "more layers than tensors": (
        lambda s: edit(s / "transformer" / "config.json", num_layers=1000),
        r"config.json: num_layers is 1000, but .*/transformer has only \d+ tensors$",
    ),
    "a network that is far larger": (
        lambda s: edit(s / "text_encoder" / "config.json", intermediate_size=2**20),
        r"config.json describes a network of [\d,]+ numbers, but .*/text_encoder has [\d,]+$",
    ),
    "a config that is a pipe": (
        lambda s: ((s / "vae" / "config.json").unlink(), os.mkfifo(s / "vae" / "config.json")),
        r"vae/config.json is not a regular file",
    ),
    "a scheduler without a shift": (
        lambda s: (s / "scheduler" / "scheduler_config.json").write_text('{"shift": 1e999}'),
        r"scheduler_config.json is not valid JSON",
    ),
    "config of other widths": (
        lambda s: edit(s / "transformer" / "config.json", num_attention_heads=4),
        r"/transformer: \d+ wrong \(x_embedder.weight is \[16, 16\] instead of \[32, 16\]|/transformer: \d+ wrong",
    ),
    "another architecture": (
        lambda s: edit(s / "vae" / "config.json", act_fn="relu"),
        r"vae/config.json: act_fn is 'relu', only 'silu' is supported",
    ),
    "pickles": (only_pickles, r"pickled weights only \(diffusion_pytorch_model.bin\): unpickling runs any code"),
    "truncated": (
        lambda s: truncate(weights_file(s, "transformer")),
        r"is truncated or corrupt: it ends before 1 of its tensors \(x_embedder.weight\)$",
    ),
    "truncated header": (
        lambda s: weights_file(s, "vae").write_bytes(weights_file(s, "vae").read_bytes()[:99]),
        r"is truncated or corrupt",
    ),
    "empty file": (lambda s: weights_file(s, "transformer").write_bytes(b""), r"is truncated or corrupt"),
    "not safetensors": (lambda s: weights_file(s, "text_encoder").write_bytes(b"x" * 99), r"is truncated or corrupt"),
    "missing shard": (
        lambda s: (s / "text_encoder_2" / "model-00002-of-00002.safetensors").unlink(),
        r"lacks 1 of the shards that its index names: model-00002-of-00002.safetensors",
    ),
    "index names too much": (swap_in_index, r"names 1 tensors that do not exist: shared.weight in model-0000"),
    "index without a map": (
        lambda s: (s / "text_encoder_2" / "model.safetensors.index.json").write_text("{}"),
        r"index\.json: missing weight_map",
    ),
    "missing tensor": (
        lambda s: change(s, "transformer", {"proj_out.bias": None}),
        r"/transformer: 1 missing \(proj_out.bias\)$",
    ),
    "left-over tensor": (
        lambda s: change(s, "vae", {"quant_conv.bias": ONES}),
        r"/vae: 1 left over \(quant_conv.bias\)$",
    ),
    "wrong shape": (
        lambda s: change(s, "text_encoder", {"text_model.final_layer_norm.bias": np.ones(9, np.float32)}),
        r"1 wrong \(text_model.final_layer_norm.bias is \[9\] instead of \[10\]\)",
    ),
    "wrong dtype": (
        lambda s: change(s, "text_encoder", {"text_model.final_layer_norm.bias": ONES.astype(np.int8)}),
        r"text_model.final_layer_norm.bias is int8 instead of float32",
    ),
    "NaN": (
        lambda s: change(s, "text_encoder", {"text_model.final_layer_norm.bias": ONES * np.nan}),
        r"/text_encoder: text_model.final_layer_norm.bias holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_a_bad_source(capfd, source, tmp_path, name):
    damage, message = DAMAGE[name]
    damage(source)
    assert_refused(capfd, source, tmp_path / "out", message)


def test_refuses_an_out_that_is_in_use(capfd, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert_refused(capfd, source, out, "exists already")
    (tmp_path / "file").write_text("")
    assert_refused(capfd, source, tmp_path / "file", "exists already")
    # root may write anywhere, but not below a file
    assert_refused(capfd, source, tmp_path / "file" / "new" / "out", "cannot write .*: .*/file is not a directory")


def test_an_empty_out_will_do(capfd, source, tmp_path):
    (tmp_path / "out").mkdir()
    assert convert(capfd, source, tmp_path / "out")[0] == 0


def test_no_room(capfd, source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert_refused(capfd, source, tmp_path / "out", r"cannot write .*: it needs 0\.\d\d GB, but only 0\.00 GB are free")


def test_the_disk_refuses_a_write(capfd, source, tmp_path):
    # Small files can be written, and large ones cannot: the operating system's own error, out of TensorStore
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert_refused(capfd, source, tmp_path / "out", "cannot write .*: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def stopping(stop):
    """In place of `layers`: reads, until the autoencoder's turn, which is the last."""

    def layers(fill, tensors, dtype, where):
        for layer in engine.layers(fill, tensors, dtype, where):
            if where.endswith("vae") and fill.target.endswith("conv_out.bias"):
                stop()
            yield layer

    return layers


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, monkeypatch, error):
    def stop():
        assert list(tmp_path.glob(".out.*.incomplete/transformer/state/manifest.ocdbt"))
        raise error

    monkeypatch.setattr(conversion, "layers", stopping(stop))
    with pytest.raises(error):
        conversion.convert_model(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_what_a_killed_conversion_left_is_cleared(capfd, source, tmp_path):
    left = tmp_path / ".out.0123456789abcdef.incomplete" / "vae"
    left.mkdir(parents=True)
    assert convert(capfd, source, tmp_path / "out")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not (tmp_path / "out" / "vae" / "vae").exists()


@pytest.mark.parametrize(
    "arguments", [["convert"], ["convert", "--source", "x", "--out", "y", "--dtype", "int8"], ["unknown"], []]
)
def test_usage_errors(capfd, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    capfd.readouterr()


def test_help_does_not_wait_for_jax():
    program = (
        "import sys\nfrom arcflow_jax.cli.app import main\ntry: main(['convert', '--help'])\n"
        "finally: assert not {'jax', 'flax', 'orbax'} & sys.modules.keys()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--source" in run.stdout
    assert "--out" in run.stdout
    assert "--dtype" in run.stdout


def test_the_package_is_the_same_command():
    command = [sys.executable, "-m", "arcflow_jax", "convert", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--source" in run.stdout


def test_the_script_is_the_same_command(source, tmp_path):
    script = [sys.executable, str(ROOT / "tools" / "convert.py")]
    command = [*script, "--source", str(source), "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    ModelDirectory.open(tmp_path / "out")
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1


def test_ctrl_c(source, tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from arcflow_jax.cli import app as cli
from arcflow_jax.models import conversion
from tests.cli.test_cli_convert import stopping
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
conversion.layers = stopping(lambda: os.kill(os.getpid(), signal.SIGINT))
cli.main(["convert", "--source", {str(source)!r}, "--out", {str(tmp_path / "out")!r}])
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert run.returncode == 130
    assert list(tmp_path.iterdir()) == [source]


def test_converts_what_diffusers_and_transformers_write(capfd, source, tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    models = {
        "transformer": diffusers.FluxTransformer2DModel.from_config(CONFIGS["transformer"]),
        "vae": diffusers.AutoencoderKL.from_config(
            CONFIGS["vae"]
            | {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
            | {"use_quant_conv": False, "use_post_quant_conv": False}
        ),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIGS["text_encoder"])),
        "text_encoder_2": transformers.T5EncoderModel(
            transformers.T5Config(**CONFIGS["text_encoder_2"], feed_forward_proj="gated-gelu")
        ),
    }
    for name, model in models.items():
        shutil.rmtree(source / name)
        model.save_pretrained(source / name, max_shard_size="8KB" if name == "text_encoder_2" else "1GB")
    assert len(list((source / "text_encoder_2").glob("*.safetensors"))) == 2
    code, _, stderr = convert(capfd, source, tmp_path / "out")
    assert (code, stderr.count("error")) == (0, 0)
    directory = ModelDirectory.open(tmp_path / "out")
    state = nnx.state(directory.abstract("text_encoder_2"))
    embedding = directory.load("text_encoder_2", state)["shared"]["embedding"][...]
    np.testing.assert_array_equal(embedding, models["text_encoder_2"].shared.weight.detach().numpy())
