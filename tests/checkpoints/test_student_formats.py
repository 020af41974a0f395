"""The authors' adapter layout, both ways, through the command line and against their own file, diffusers and PEFT."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from arcflow_jax.checkpoints.student_formats import import_adapter, open_student
from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.convert.adapter import AdapterTable
from arcflow_jax.convert.backbones import flux as table
from arcflow_jax.convert.engine import export_tensors
from arcflow_jax.errors import UserError
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.student import split_model
from arcflow_jax.parallel.mesh import parse_mesh, sharded
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.safetensors import read_header
from tests.helpers.command_line import assert_refused, run
from tests.helpers.fake_hub import ID, serving
from tests.helpers.golden import TEACHER_FILE, check_mixture, student_case, student_inputs
from tests.helpers.paths import ROOT
from tests.helpers.students import (
    LORA,
    RELEASED,
    WEIGHTS,
    attach_student,
    convert,
    curve,
    export,
    metadata,
    predicted,
    student,
    write_run,
)
from tests.helpers.twins import flux_inputs, flux_twin_output, relative_error


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in read_header(folder / WEIGHTS).items()}


def assert_same_tensors(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_the_authors_file_there_and_back(capfd, base, tmp_path):
    ours = convert(capfd, RELEASED, base, tmp_path / "new" / "ours")
    back = export(capfd, ours, tmp_path / "back")
    assert_same_tensors(read_weights(back), read_weights(RELEASED))
    assert metadata(back) == metadata(RELEASED)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (back, RELEASED)]
    assert configs[0] | {"_diffusers_version": "0.35.1", "out_channels": None} == configs[1]

    description = AdapterDescription.read(ours)
    assert description.base == ModelDirectory.open(base).fingerprint
    assert (description.adapter.rank, description.adapter.alpha, description.adapter.modes) == (4, 4.0, 4)
    assert (description.distillation, description.guidance) == (Distillation(), 3.5)
    check_mixture(curve(student(base, ours), *student_inputs(student_case("06d"))), student_case("06d"))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_lone_file_with_prefixed_names(capfd, base, released, tmp_path, dtype):
    tensors = {f"transformer.{name}": t.astype(dtype) for name, t in load_file(released / WEIGHTS).items()}
    (released / WEIGHTS).unlink()
    save_file(tensors, released / "student.safetensors")
    ours = convert(capfd, released / "student.safetensors", base, tmp_path / "ours")
    back = read_weights(export(capfd, ours, tmp_path / "back", "--dtype", np.dtype(dtype).name))
    assert_same_tensors({f"transformer.{name}": tensor for name, tensor in back.items()}, tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_a_run_there_and_back(capfd, base, tmp_path, dtype, raw):
    states = write_run(tmp_path / "run", base)
    expected = export_tensors(AdapterTable(table), states[not raw])
    first = export(capfd, tmp_path / "run", tmp_path / "first", "--dtype", dtype, *raw)
    assert_same_tensors(read_weights(first), {name: x.astype(jnp.dtype(dtype)) for name, x in expected.items()})

    ours = convert(capfd, first, base, tmp_path / "ours")
    again = export(capfd, ours, tmp_path / "again", "--dtype", dtype)
    for file in ("config.json", WEIGHTS):
        assert (again / file).read_bytes() == (first / file).read_bytes()


def test_alpha_is_folded_into_the_update(capfd, base, tmp_path):
    """What the layout has no place for; the next test has PEFT compute with it."""
    _, ema = write_run(tmp_path / "run", base, dataclasses.replace(LORA, alpha=6.0))
    out = export(capfd, tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    expected = export_tensors(AdapterTable(table), ema)
    scaled = {name: x * np.float32(1.5 if "lora_B" in name else 1) for name, x in expected.items()}
    assert_same_tensors(read_weights(out), scaled)
    assert AdapterDescription.read(convert(capfd, out, base, tmp_path / "ours")).adapter.alpha == LORA.rank


def test_diffusers_and_peft_read_it(capfd, base, tmp_path):
    """As the authors' loader does: base and head by name, then the LoRA by diffusers' own loader."""
    _, _, diffusers = map(pytest.importorskip, ("torch", "peft", "diffusers"))
    from safetensors.torch import load_file as load_torch

    write_run(tmp_path / "run", base, dataclasses.replace(LORA, alpha=6.0))
    folder = export(capfd, tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    config = diffusers.AutoModel.load_config(folder)
    assert config["_class_name"] == "ArcFluxTransformer2DModel"
    twin = diffusers.FluxTransformer2DModel.from_config(config).eval()
    twin.load_state_dict(load_torch(TEACHER_FILE))
    attach_student(twin, folder)

    model = student(base, tmp_path / "run")
    tokens, sigma, c = flux_inputs(model.backbone.config)
    theirs = flux_twin_output(twin, tokens, sigma, c)
    assert relative_error(predicted(model, tokens, sigma, c), theirs) < 1e-5


def test_sampling_settings_travel(capfd, base, tmp_path):
    write_run(tmp_path / "run", base, settings=Distillation(nfe=4, shift=1.0, final_step_ratio=0.5), guidance=2.0)
    out = export(capfd, tmp_path / "run", tmp_path / "out")
    policy = {"nfe": 4, "shift": 1.0, "timestep_ratio": 0.5, "distilled_guidance_scale": 2.0, "type": "ArcFlow"}
    assert json.loads(metadata(out)["policy_config"]) == policy

    description = AdapterDescription.read(convert(capfd, out, base, tmp_path / "ours"))
    assert description.distillation == Distillation(nfe=4, shift=1.0, final_step_ratio=0.5)
    assert description.guidance == 2.0

    options = ("--steps", 3, "--shift", 2.5, "--final-step-ratio", 0.75, "--guidance", 5)
    description = AdapterDescription.read(convert(capfd, out, base, tmp_path / "overruled", *options))
    assert description.distillation == Distillation(nfe=3, shift=2.5, final_step_ratio=0.75)
    assert description.guidance == 5.0


def test_export_follows_the_umask(capfd, base, tmp_path):
    write_run(tmp_path / "run", base)
    former = os.umask(0o027)
    try:
        out = export(capfd, tmp_path / "run", tmp_path / "out")
    finally:
        os.umask(former)
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o640}


@pytest.mark.slow
def test_a_converted_student_makes_the_same_images(tiny_flux, capfd, tmp_path):
    write_run(tmp_path / "run", tiny_flux)
    out = export(capfd, tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    ours = convert(capfd, out, tiny_flux, tmp_path / "ours")

    settings = ("--model", tiny_flux, "--prompt", "a red circle", "--height", 32, "--width", 32)
    code, stdout, stderr = run(capfd, "sample", *settings, "--adapter", ours, "--out", tmp_path / "images")
    assert (code, stderr) == (0, "")
    pixels = np.asarray(Image.open(stdout.strip()))
    pipeline = ArcFlowPipeline.from_pretrained(tiny_flux, adapter=tmp_path / "run")
    np.testing.assert_array_equal(pixels, np.asarray(pipeline(["a red circle"], height=32, width=32).images[0]))
    assert pixels.std() > 0
    for released in (out, out / WEIGHTS):  # and as it is
        pipeline = ArcFlowPipeline.from_pretrained(tiny_flux, released)
        np.testing.assert_array_equal(pixels, np.asarray(pipeline(["a red circle"], height=32, width=32).images[0]))


def test_students_on_the_hub(capfd, base, tmp_path, monkeypatch):
    """At the root of a repository or in a folder, as the authors keep theirs; a run as well as an export."""
    shutil.copytree(RELEASED, tmp_path / "repository")
    shutil.copytree(RELEASED, tmp_path / "repository" / "2steps")
    write_run(tmp_path / "repository" / "run", base)
    (tmp_path / "repository" / "2steps" / "pytorch_model.bin").write_bytes(b"not to be fetched")
    whole = ("--base", base)
    with serving(tmp_path / "repository", tmp_path / "cache", monkeypatch) as fake:

        def fetched(source: str, name: str, *options: object) -> list[str]:
            fake.fetched.clear()
            arguments = ("--adapter", source, *whole, "--out", tmp_path / name, *options)
            code, stdout, _ = run(capfd, "convert", *arguments)
            assert (code, stdout) == (0, f"converted {source} to {tmp_path / name}\n")
            return sorted(fake.fetched)

        assert fetched(f"{ID}/2steps", "in_folder", "--revision", "v1") == ["2steps/config.json", f"2steps/{WEIGHTS}"]
        assert fetched(ID, "at_root") == ["config.json", WEIGHTS]

        def refused(message: str, *arguments: object) -> None:
            command = ("convert", "--out", tmp_path / "out", *whole, *arguments)
            assert_refused(capfd, tmp_path / "repository", *command, message=message)

        refused("the hub has no model owner/other that you may see", "--adapter", "owner/other")
        refused(f"{ID} has no revision v9", "--adapter", ID, "--revision", "v9")
        refused("is not on the hub, and only a student there has a revision", "--adapter", RELEASED, "--revision", "v1")
        refused("adapter nowhere does not exist, and a hub id has the form owner/name", "--adapter", "nowhere")
        with pytest.raises(UserError, match=f"^{ID}/nowhere on the hub holds no student$"):
            import_adapter(f"{ID}/nowhere", base, tmp_path / "out")

        directory = ModelDirectory.open(base)
        local = {"2steps": RELEASED, "run": tmp_path / "repository" / "run"}
        for name, path in local.items():
            (description, restore), (expected, restore_expected) = (
                open_student(where, directory) for where in (f"{ID}/{name}", path)
            )
            assert description == expected
            _, _, abstract = split_model(directory.student(description.adapter, jnp.float32))
            abstract = sharded(parse_mesh(""), abstract)
            jax.tree.map(
                np.testing.assert_array_equal, *(read(abstract, False) for read in (restore, restore_expected))
            )
    capfd.readouterr()  # huggingface_hub's progress
    back = export(capfd, tmp_path / "in_folder", tmp_path / "back")
    assert_same_tensors(read_weights(back), read_weights(RELEASED))


def test_the_script_is_the_same_command(tmp_path):
    command = [sys.executable, ROOT / "tools" / "export.py", "--adapter", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .* holds no adapter.*\n", done.stderr)
