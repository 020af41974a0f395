"""Students that import and export refuse, each with one line and nothing written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.demo import ASSETS
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.training.loop import describe
from tests.helpers.command_line import assert_refused
from tests.helpers.full_disk import disk_for_files_up_to
from tests.helpers.students import LORA, RELEASED, WEIGHTS, convert, export, metadata, write_run


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
    "one mode": (
        lambda f: edit(f, num_gaussians=1),
        r"num_gaussians is 1, but has to be a whole number from 2 to",
    ),
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
        r"policy_config\.shift is 'three', but has to be a number from 0\.001 to 1000",
    ),
    "policy of no steps": (
        lambda f: set_policy(f, '{"type": "ArcFlow", "nfe": 0}'),
        r"policy_config\.nfe is 0, but has to be a whole number from 1 to 10000",
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
    refused("shift is -1.0, but has to be a number from 0.001 to 1000", *whole, "--shift", -1)
    refused("released exists already", *whole, out=released)


def test_a_converted_student_refuses_another_base(tiny_flux, capfd, base, tmp_path):
    ours = convert(capfd, RELEASED, base, tmp_path / "ours")
    arguments = ("sample", "--model", tiny_flux, "--adapter", ours, "--prompt", "a ring", "--out", tmp_path / "images")
    assert_refused(capfd, tmp_path, *arguments, message=r"was trained on base [0-9a-f]{12}…, this model is")


def refuse_export(capfd, run: Path, message: str, *options: object) -> None:
    arguments = ("export", "--adapter", run, "--out", run.parent / "out", *options)
    assert_refused(capfd, run.parent, *arguments, message=message)


def test_full_disk_under_a_converted_student_leaves_nothing(capfd, base, tmp_path):
    arguments = ("convert", "--adapter", RELEASED, "--base", base, "--out", tmp_path / "ours")
    with disk_for_files_up_to(4096):
        assert_refused(capfd, tmp_path, *arguments, message="cannot write a checkpoint to .*/ours: File too large")
    with disk_for_files_up_to(512):
        assert_refused(capfd, tmp_path, *arguments, message="cannot write a checkpoint to .*/ours: File too large")


def test_export_refuses_what_is_no_finished_student(capfd, base, tmp_path):
    refuse_export(capfd, tmp_path / "nothing", "holds no adapter")
    (tmp_path / "empty").mkdir()
    refuse_export(capfd, tmp_path / "empty", "holds no adapter")
    refuse_export(capfd, base, "holds no adapter")
    (tmp_path / "begun").mkdir()
    AdapterDescription("0" * 64, LORA, Distillation(), 3.5).write(tmp_path / "begun")
    refuse_export(capfd, tmp_path / "begun", "holds no checkpoint yet")
    ours = convert(capfd, RELEASED, base, tmp_path / "ours")
    refuse_export(capfd, ours, "holds EMA weights only: leave --raw out", "--raw")
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
    write_run(tmp_path / "run", base, changed=with_bias(-1e5))
    refuse_export(capfd, tmp_path / "run", r"proj_out_means\.bias holds 1e\+05, too large for float16: try --dtype")
    export(capfd, tmp_path / "run", tmp_path / "bfloat16", "--dtype", "bfloat16")
    export(capfd, tmp_path / "run", tmp_path / "raw", "--raw")

    write_run(tmp_path / "diverged", base, changed=with_bias(float("nan")))
    refuse_export(
        capfd, tmp_path / "diverged", r"proj_out_means\.bias holds NaN or infinite values", "--dtype", "float32"
    )


def test_a_run_of_an_early_version_lacks_its_base_config(capfd, base, tmp_path):
    write_run(tmp_path / "run", base)
    description = AdapterDescription.read(tmp_path / "run")
    dataclasses.replace(description, transformer=None).write(tmp_path / "run")
    refuse_export(
        capfd, tmp_path / "run", "lacks its base's config, .*: resume the run with arcflow train, which adds it"
    )
    describe(tmp_path / "run", description)  # as a resumed run does
    export(capfd, tmp_path / "run", tmp_path / "out")
