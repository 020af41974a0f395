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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from arcflow_jax.checkpoints.conversion import convert_model
from arcflow_jax.checkpoints.model_directory import ModelDirectory
from arcflow_jax.checkpoints.student_formats import import_adapter, open_student
from arcflow_jax.checkpoints.training import AdapterDescription, Checkpoints
from arcflow_jax.convert import flux as table
from arcflow_jax.convert.adapter import AdapterTable
from arcflow_jax.convert.engine import export_tensors
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.networks.student import AdapterConfig, ArcModel, split_model
from arcflow_jax.parallel.mesh import parse_mesh, sharded
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.storage.safetensors import read_header
from arcflow_jax.training.loop import describe
from arcflow_jax.training.state import Skipped, TrainState
from tests.cli.test_cli import assert_refused, run
from tests.helpers.fake_hub import ID, serving
from tests.helpers.full_disk import disk_for_files_up_to
from tests.helpers.golden import LORA, RELEASED, TEACHER_FILE, check_mixture, student_case, student_inputs
from tests.helpers.source_folder import weights_file, write_source
from tests.helpers.twins import flux_inputs, flux_twin_output, relative_error

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A converted model around the authors' tiny teacher."""
    folder = tmp_path_factory.mktemp("base")
    write_source(folder / "source")
    config = json.loads((RELEASED / "config.json").read_text()) | {"_class_name": "FluxTransformer2DModel"}
    (folder / "source" / "transformer" / "config.json").write_text(json.dumps(config))
    shutil.copy(TEACHER_FILE, weights_file(folder / "source", "transformer"))
    return convert_model(folder / "source", folder / "model")


@pytest.fixture
def released(tmp_path) -> Path:
    """The authors' student, in a folder that a test may damage."""
    return shutil.copytree(RELEASED, tmp_path / "released")


def random_student(directory: ModelDirectory, adapter: AdapterConfig, seed: int) -> nnx.State:
    _, _, abstract = split_model(directory.student(adapter, jnp.float32))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), abstract)


def write_run(
    path: Path,
    base: Path,
    adapter: AdapterConfig = LORA,
    settings: Distillation = Distillation(),  # noqa: B008
    guidance: float = 3.5,
    ema: Callable[[nnx.State], nnx.State] = lambda state: state,
) -> tuple[nnx.State, nnx.State]:
    """What a training run leaves, with random weights that `ema` may change; returns raw and averaged ones."""
    directory = ModelDirectory.open(base)
    transformer = directory.description["components"]["transformer"]
    describe(path, AdapterDescription(directory.fingerprint, adapter, settings, guidance, transformer))
    raw, averaged = random_student(directory, adapter, 1), ema(random_student(directory, adapter, 2))
    with Checkpoints(path) as checkpoints:
        state = TrainState(jnp.int32(7), raw, averaged, (jnp.zeros(3),), Skipped(jnp.int32(0), jnp.int32(0)))
        checkpoints.save(7, state.items())
    return raw, averaged


def convert(capfd, source: Path, base: Path, out: Path, *options: object) -> Path:
    code, stdout, stderr = run(capfd, "convert", "--adapter", source, "--base", base, "--out", out, *options)
    assert (code, stdout, stderr) == (0, f"converted {source} to {out}\n", "")
    return out


def export(capfd, adapter: Path, out: Path, *options: object) -> Path:
    code, stdout, stderr = run(capfd, "export", "--adapter", adapter, "--out", out, *options)
    assert (code, stdout, stderr) == (0, f"exported {adapter} to {out}\n", "")
    return out


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, "np") as file:
        return file.metadata()


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in read_header(folder / WEIGHTS).items()}


def assert_same_tensors(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def student(base: Path, adapter: Path) -> ArcModel:
    """As the pipeline puts it together, but not merged."""
    directory = ModelDirectory.open(base)
    description = AdapterDescription.read(adapter)
    graphdef, frozen, trained = split_model(directory.student(description.adapter, jnp.float32))
    with Checkpoints(adapter) as checkpoints:
        return nnx.merge(graphdef, directory.load("transformer", frozen), checkpoints.restore_adapter(trained))


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
    check_mixture(student(base, ours).student_curve(*student_inputs(student_case("06d"))), student_case("06d"))


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
    _, averaged = write_run(tmp_path / "run", base, dataclasses.replace(LORA, alpha=6.0))
    out = export(capfd, tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    expected = export_tensors(AdapterTable(table), averaged)
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


def attach_student(twin, folder: Path) -> None:
    """Makes a teacher of diffusers' the student in a folder, which gives all its numbers in place of a velocity."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file as load_torch

    tensors = load_torch(folder / WEIGHTS)
    # The three projections as one, in the place of the teacher's
    weight, bias = (
        torch.cat([tensors[f"proj_out_{name}.{kind}"] for name in ("means", "logweights", "loggamma")])
        for kind in ("weight", "bias")
    )
    twin.proj_out = torch.nn.Linear(*reversed(weight.shape))
    twin.proj_out.load_state_dict({"weight": weight, "bias": bias})
    twin.norm_out.load_state_dict({name: tensors[f"norm_out.{name}"] for name in ("linear.weight", "linear.bias")})
    lora = {name: tensor for name, tensor in tensors.items() if "lora" in name}
    twin.load_lora_adapter(dict(lora), prefix=None, adapter_name="student")
    loaded = get_peft_model_state_dict(twin, adapter_name="student")
    assert loaded.keys() == lora.keys()
    assert all(torch.equal(loaded[name], lora[name]) for name in lora)


def predicted(model: ArcModel, tokens, sigma, conditioning) -> jax.Array:
    """All numbers of a student's mixture, [B, N, ...], in the order of `attach_student`."""
    mixture = model.student_curve(tokens, sigma, conditioning)
    return jnp.concatenate([part.reshape(*tokens.shape[:2], -1) for part in dataclasses.astuple(mixture)], axis=-1)


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


def test_a_converted_student_makes_the_same_pictures(capfd, tmp_path):
    base = convert_model(ASSETS / "tiny-flux", tmp_path / "base")
    write_run(tmp_path / "run", base)
    out = export(capfd, tmp_path / "run", tmp_path / "out", "--dtype", "float32")
    ours = convert(capfd, out, base, tmp_path / "ours")

    settings = ("--model", base, "--prompt", "a red circle", "--height", 32, "--width", 32)
    code, stdout, stderr = run(capfd, "sample", *settings, "--adapter", ours, "--out", tmp_path / "pictures")
    assert (code, stderr) == (0, "")
    pixels = np.asarray(Image.open(stdout.strip()))
    pipeline = ArcFlowPipeline.from_pretrained(base, adapter=tmp_path / "run")
    np.testing.assert_array_equal(pixels, np.asarray(pipeline(["a red circle"], height=32, width=32)[0]))
    assert pixels.std() > 0
    for released in (out, out / WEIGHTS):  # and as it is
        pipeline = ArcFlowPipeline.from_pretrained(base, released)
        np.testing.assert_array_equal(pixels, np.asarray(pipeline(["a red circle"], height=32, width=32)[0]))


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
        refused("does not exist, and a hub id is owner/name or owner/name/folder", "--adapter", "nowhere")
        with pytest.raises(UserError, match=f"^{ID}/nowhere on the hub holds no student's files$"):
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


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    """Changes tensors (dots are written as __), and removes those that are None."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    changed = load_file(folder / WEIGHTS) | named
    save_file({n: t for n, t in changed.items() if t is not None}, folder / WEIGHTS, metadata(folder))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: x for key, x in config.items() if x != "gone"}))


def set_policy(folder: Path, text: str) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"policy_config": text})


def only_head(folder: Path) -> None:
    head = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "lora" not in name}
    save_file(head, folder / WEIGHTS)


def f16(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float16)


DAMAGE = {
    "no such folder": (shutil.rmtree, r"adapter .*/released does not exist"),
    "missing head tensor": (
        lambda f: change(f, proj_out_means__bias=None),
        r"/released: 1 missing \(proj_out_means\.bias\)$",
    ),
    "missing layer": (
        lambda f: change(f, **{"transformer_blocks.1.ff.net.2.lora_B.weight": None}),
        r"1 missing \(transformer_blocks\.1\.ff\.net\.2\.lora_B\.weight\)$",
    ),
    "a layer that the base lacks": (
        lambda f: change(f, **{"transformer_blocks.7.ff.net.2.lora_A.weight": f16(4, 256)}),
        r"1 left over \(transformer_blocks\.7\.ff\.net\.2\.lora_A\.weight\)$",
    ),
    "a module that the base lacks": (
        lambda f: change(f, **{"transformer_blocks.0.mlp.lora_A.weight": f16(4, 64)}),
        r"1 left over \(transformer_blocks\.0\.mlp\.lora_A\.weight\)$",
    ),
    "A and B of two ranks": (
        lambda f: change(f, **{"transformer_blocks.0.ff.net.2.lora_B.weight": f16(64, 5)}),
        r"1 wrong \(transformer_blocks\.0\.ff\.net\.2\.lora_B\.weight is \[64, 5\] instead of \[64, 4\]\)$",
    ),
    "a module of another rank": (
        lambda f: change(
            f,
            **{
                "time_text_embed.timestep_embedder.linear_1.lora_A.weight": f16(2, 256),
                "time_text_embed.timestep_embedder.linear_1.lora_B.weight": f16(64, 2),
            },
        ),
        r"2 wrong \(time_text_embed\.timestep_embedder\.linear_1\.lora_A\.weight is \[2, 256\] instead of \[4, 256\]",
    ),
    "no LoRA": (only_head, r"/released holds no LoRA"),
    "another number of modes": (
        lambda f: edit(f, num_gaussians=8),
        r"6 wrong \(proj_out_loggamma\.bias is \[12\] instead of \[28\]",
    ),
    "one mode": (lambda f: edit(f, num_gaussians=1), r"num_gaussians is 1, but has to be a whole number above 1"),
    "no modes": (lambda f: edit(f, num_gaussians="gone"), r"config\.json: missing num_gaussians"),
    "a weight a channel": (
        lambda f: edit(f, logweights_channels=1),
        r"config\.json: logweights_channels is 1, only 4 is supported",
    ),
    "another base": (
        lambda f: edit(f, num_layers=3, guidance_embeds=False),
        r"another base than .*: it has num_layers 3 instead of 2, guidance_embeds False instead of True$",
    ),
    "another class": (
        lambda f: edit(f, _class_name="ArcQwenImageTransformer2DModel"),
        r"is of class ArcQwenImageTransformer2DModel, a student of this base is of ArcFluxTransformer2DModel",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]),
        r"safetensors is truncated or corrupt",
    ),
    "pickle": (
        lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"),
        r"holds pickled weights only \(diffusion_pytorch_model\.bin\)",
    ),
    "NaN": (
        lambda f: change(f, proj_out_means__bias=f16(256) * np.float16("nan")),
        r"/released: proj_out_means\.bias holds NaN",
    ),
    "policy that is no JSON": (lambda f: set_policy(f, "{"), r"policy_config is not valid JSON"),
    "another policy": (lambda f: set_policy(f, '{"type": "GMFlow"}'), r"policy_config .* not of type ArcFlow"),
    "policy of words": (
        lambda f: set_policy(f, '{"type": "ArcFlow", "shift": "three"}'),
        r"policy_config has shift 'three', which is not a number",
    ),
    "policy of no steps": (
        lambda f: set_policy(f, '{"type": "ArcFlow", "nfe": 0}'),
        r"nfe is 0, but has to be at least 1",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_convert_refuses_a_bad_adapter(capfd, base, released, tmp_path, name):
    damage, message = DAMAGE[name]
    damage(released)
    arguments = ("convert", "--adapter", released, "--base", base, "--out", tmp_path / "out")
    assert_refused(capfd, tmp_path, *arguments, message=message)


def test_convert_refuses_other_bad_input(capfd, base, released, tmp_path):
    def refused(message: str, *arguments: object, out: Path = tmp_path / "out") -> None:
        assert_refused(capfd, tmp_path, "convert", "--out", out, *arguments, message=message)

    whole = ("--adapter", released, "--base", base)
    pickle = released / "student.pt"
    pickle.write_bytes(b"\x80\x04")
    refused(r"student\.pt is a pickle: unpickling runs", "--adapter", pickle, "--base", base)
    refused("is not a converted model", "--adapter", released, "--base", tmp_path)
    refused("with --base, and without a model's options", "--adapter", released)
    refused("with --base, and without a model's options", *whole, "--source", base)
    refused("with --base, and without a model's options", *whole, "--dtype", "float32")
    refused("name the model to convert with --source", "--base", base)
    refused("belong to --adapter", "--source", ASSETS / "tiny-flux", "--shift", 1)
    refused("shift is -1.0, but has to be above 0", *whole, "--shift", -1)
    refused("released exists already", *whole, out=released)


def test_a_converted_student_refuses_another_base(capfd, base, tmp_path):
    ours = convert(capfd, RELEASED, base, tmp_path / "ours")
    other = convert_model(ASSETS / "tiny-flux", tmp_path / "other")
    arguments = ("sample", "--model", other, "--adapter", ours, "--prompt", "a ring", "--out", tmp_path / "pictures")
    assert_refused(capfd, tmp_path, *arguments, message=r"was trained on base [0-9a-f]{12}…, this model is")


def refuse_export(capfd, run: Path, message: str, *options: object) -> None:
    arguments = ("export", "--adapter", run, "--out", run.parent / "out", *options)
    assert_refused(capfd, run.parent, *arguments, message=message)


def test_full_disk_under_a_converted_student_leaves_nothing(capfd, base, tmp_path):
    arguments = ("convert", "--adapter", RELEASED, "--base", base, "--out", tmp_path / "ours")
    with disk_for_files_up_to(4096):
        assert_refused(capfd, tmp_path, *arguments, message="cannot write a checkpoint to .*: ")
    with disk_for_files_up_to(512):
        assert_refused(capfd, tmp_path, *arguments, message="cannot write .*/ours: File too large")


def test_export_refuses_what_is_no_finished_student(capfd, base, tmp_path):
    refuse_export(capfd, tmp_path / "nothing", "holds no adapter")
    (tmp_path / "empty").mkdir()
    refuse_export(capfd, tmp_path / "empty", "holds no adapter")
    refuse_export(capfd, base, "holds no adapter")
    (tmp_path / "begun").mkdir()
    AdapterDescription("0" * 64, LORA, Distillation(), 3.5).write(tmp_path / "begun")
    refuse_export(capfd, tmp_path / "begun", "holds no checkpoint yet")
    ours = convert(capfd, RELEASED, base, tmp_path / "ours")
    refuse_export(capfd, ours, "holds averaged weights only: leave --raw out", "--raw")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refuse_export(capfd, ours, "out exists already")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ()}, "holds a student without LoRA"),
        ({"modes": 1}, "holds a linear student"),
        ({"basis": "legendre"}, "holds a student of basis legendre"),
    ],
)
def test_export_refuses_what_the_layout_has_no_room_for(capfd, base, tmp_path, changes, message):
    write_run(tmp_path / "run", base, dataclasses.replace(LORA, **changes))
    refuse_export(capfd, tmp_path / "run", message)


def with_bias(value: float) -> Callable[[nnx.State], nnx.State]:
    def changed(state: nnx.State) -> nnx.State:
        bias = state["head"]["proj_out_means"]["bias"]
        bias[...] = bias[...].at[3].set(value)
        return state

    return changed


def test_export_refuses_values_beyond_the_dtype(capfd, base, tmp_path):
    write_run(tmp_path / "run", base, ema=with_bias(-1e5))
    refuse_export(capfd, tmp_path / "run", r"proj_out_means\.bias holds 1e\+05, too large for float16: try --dtype")
    export(capfd, tmp_path / "run", tmp_path / "bfloat16", "--dtype", "bfloat16")
    export(capfd, tmp_path / "run", tmp_path / "raw", "--raw")

    write_run(tmp_path / "diverged", base, ema=with_bias(float("nan")))
    refuse_export(
        capfd, tmp_path / "diverged", r"proj_out_means\.bias holds NaN or infinite values", "--dtype", "float32"
    )


def test_a_run_from_before_the_geometry_was_kept(capfd, base, tmp_path):
    write_run(tmp_path / "run", base)
    description = AdapterDescription.read(tmp_path / "run")
    dataclasses.replace(description, transformer=None).write(tmp_path / "run")
    refuse_export(capfd, tmp_path / "run", "does not say its base's geometry yet: arcflow train adds it")
    describe(tmp_path / "run", description)  # as a resumed run does
    export(capfd, tmp_path / "run", tmp_path / "out")


def test_the_script_is_the_same_command(tmp_path):
    command = [sys.executable, ROOT / "tools" / "export.py", "--adapter", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .* holds no adapter.*\n", done.stderr)
