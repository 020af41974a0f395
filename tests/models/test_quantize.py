"""Quantized model directories: converted so, or quantized later; adapters that fit, and students on them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from arcflow_jax.checkpoints.verify import verify
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import NetworkError, UserError
from arcflow_jax.models import quantize as quantize_module
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.models.quantize import quantize_model
from arcflow_jax.networks.kernel import quantize, quantized_array
from arcflow_jax.networks.layers import linear_layers
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.embeddings import encoders_fingerprint
from arcflow_jax.training.loop import train
from arcflow_jax.training.report import dry_run
from tests.helpers.command_line import assert_refused, run
from tests.helpers.damage import overwrite
from tests.helpers.random_student import write_adapter
from tests.helpers.tiny_run import losses, recipe, saved

FORMATS = ("int8", "fp8", "int4")


@pytest.fixture(scope="module")
def quantized(tiny_flux, tmp_path_factory) -> dict[str, Path]:
    """The bundled FLUX.1, quantized after its conversion."""
    folder = tmp_path_factory.mktemp("quantized")
    return {format: quantize_model(tiny_flux, folder / format, format) for format in FORMATS}


@pytest.fixture(scope="module")
def student(tiny_flux, tmp_path_factory) -> Path:
    return write_adapter(tiny_flux, tmp_path_factory.mktemp("student") / "run", seed=0)


@pytest.mark.parametrize("format", FORMATS)
def test_quantizing_later_is_quantizing_at_once(tiny_flux, quantized, tmp_path, format):
    at_once = ModelDirectory.open(convert_model(ASSETS / "tiny-flux", tmp_path / "model", quantize=format))
    later, plain = ModelDirectory.open(quantized[format]), ModelDirectory.open(tiny_flux)
    assert later.description.components == at_once.description.components
    assert later.description.tokenizers == at_once.description.tokenizers
    assert later.fingerprint == plain.fingerprint
    assert verify(quantized[format]) == verify(tmp_path / "model") == 6
    for name, entry in later.description.components.items():
        assert (entry.quantization is None) == (name == "vae")
    assert later.description.components["vae"] == plain.description.components["vae"]


def endpoint(pipe: ArcFlowPipeline) -> np.ndarray:
    noise = pipe.noise(0, 1, 2, 2)
    conditioning = pipe.encode(["a red circle"], guidance=2.0, rows=2, columns=2)
    return np.asarray(pipe.denoise(noise, conditioning, 2))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_student_on_a_quantized_base(tiny_flux, quantized, student, format):
    """It samples as on the dequantized base, and has the LoRA of the base that it was trained on."""
    pipe = ArcFlowPipeline.from_pretrained(quantized[format], student)
    assert pipe.origin["lora"] == "apart"
    plain = ArcFlowPipeline.from_pretrained(tiny_flux, student, merge=False)
    directory = ModelDirectory.open(quantized[format])
    exact = endpoint(plain)
    model = nnx.merge(plain.graphdef, plain.transformer.state)
    for path in directory.quantization("transformer").layers:
        kernel = linear_layers(model)[path].kernel
        layers = [qwix.dequantize(quantized_array(*quantize(each, format), format)) for each in kernel[...]]
        kernel[...] = jnp.stack(layers).astype(kernel.dtype)
    plain.transformer.state, plain.prompt_encoder = nnx.state(model), pipe.prompt_encoder
    np.testing.assert_allclose(endpoint(pipe), endpoint(plain), rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(endpoint(pipe) - exact) > 1e-3 * np.linalg.norm(exact)


def test_a_dry_run_counts_weights_and_not_codes(tiny_flux, quantized, tmp_path):
    """int4 has two weights in a byte, and every format has scales beside them."""
    texts = [dry_run.report(recipe(model, tmp_path / "run")) for model in (tiny_flux, *quantized.values())]
    assert len({line for text in texts for line in text.splitlines() if line.startswith("parameters")}) == 1


@pytest.mark.slow
def test_training_on_a_quantized_base(quantized, tmp_path):
    """It trains, is the same after a resume, and its student samples; the codes are never trained."""
    plan = recipe(quantized["int4"], tmp_path / "whole", optimizer={"learning_rate": 1e-2})
    train(plan)
    assert np.isfinite(losses(tmp_path / "whole")).all()
    assert not [name for name in saved(tmp_path / "whole") if "codes" in name]
    train(dataclasses.replace(plan, out=str(tmp_path / "parts"), steps=2))
    train(dataclasses.replace(plan, out=str(tmp_path / "parts")))
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    assert np.isfinite(endpoint(ArcFlowPipeline.from_pretrained(quantized["int4"], tmp_path / "whole"))).all()


def test_only_some_components(tiny_flux, quantized, tmp_path):
    some = ModelDirectory.open(quantize_model(tiny_flux, tmp_path / "some", {"text_encoder_2": "int8"}))
    assert some.quantization("transformer") is some.quantization("text_encoder") is None
    more = ModelDirectory.open(quantize_model(some.path, tmp_path / "more", {"transformer": "int4"}))
    found = {name: more.quantization(name) for name in more.networks}
    formats = {name: each.format for name, each in found.items() if each is not None}
    assert formats == {"transformer": "int4", "text_encoder_2": "int8"}
    verify(more.path)
    models = (tiny_flux, some.path, quantized["int4"])
    assert (
        len({encoders_fingerprint(ModelDirectory.open(each)) for each in models}) == 3
    )  # an embedding cache of one does not fit another


def test_refusals(tiny_flux, quantized, student, tmp_path, capfd):
    out = tmp_path / "out"

    def refused(*arguments: object, message: str) -> None:
        assert_refused(capfd, tmp_path, *arguments, message=message)

    refused("quantize", "--model", quantized["int8"], "--out", out, message="transformer is quantized to int8 already")
    refused("quantize", "--model", tiny_flux, "--out", out, "--quantize", "int3", message="'int3': use int8, fp8, int4")
    refused(
        "quantize", "--model", tiny_flux, "--out", out, "--quantize", "vae=int8", message="cannot quantize vae, only"
    )
    refused("quantize", "--model", tiny_flux, "--out", out, "--quantize", "transformer=", message="COMPONENT=FORMAT")
    refused("quantize", "--model", tmp_path / "none", "--out", out, message="does not exist")
    options = ("--model", quantized["int8"], "--adapter", student, "--prompt", "a", "--out", out)
    refused("sample", *options, "--merge", message="cannot be merged into int8 weights")
    refused("sample", *options, "--compute", "fp8", message="need fp8 weights, but those of this model are int8")


def test_a_damaged_source_is_told(tiny_flux, tmp_path):
    """In the values, and in the lists of what there is."""
    state = tiny_flux / "transformer" / "state"
    values = max((state / "ocdbt.process_0" / "d").iterdir(), key=lambda file: file.stat().st_size)
    for file in (values, state / "manifest.ocdbt", state / "_METADATA"):
        model = shutil.copytree(tiny_flux, tmp_path / "model")
        overwrite(model / file.relative_to(tiny_flux))
        with pytest.raises(UserError, match=r"transformer is damaged: .*; convert the model again"):
            quantize_model(model, tmp_path / "out", "int8")
        assert sorted(tmp_path.iterdir()) == [model]
        shutil.rmtree(model)


def test_a_source_that_does_not_answer_is_not_damaged(tiny_flux, tmp_path, monkeypatch):
    def unavailable(*_: object, **__: object) -> None:
        raise ValueError("UNAVAILABLE: CURL error Could not resolve host")

    monkeypatch.setattr(quantize_module.ts, "open", unavailable)
    with pytest.raises(NetworkError, match="cannot be reached, try again: UNAVAILABLE"):
        quantize_model(tiny_flux, tmp_path / "out", "int8")


def test_the_command_line(tiny_flux, student, tmp_path, capfd):
    """The commands of the documents: quantize, then sample with products in 8 bits."""
    code, _, stderr = run(capfd, "quantize", "--model", tiny_flux, "--out", tmp_path / "int8")
    assert code == 0, stderr
    options = ("--adapter", student, "--prompt", "a red circle", "--compute", "int8", "--out", tmp_path / "images")
    code, _, stderr = run(capfd, "sample", "--model", tmp_path / "int8", *options)
    assert code == 0, stderr
    assert len(list((tmp_path / "images").glob("*.png"))) == 1
