"""The command line: its help, its errors, and that bad input leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.numpy import save, save_file

from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.cli.app import app
from arcflow_jax.cli.options import SamplingOptions, expand_options
from arcflow_jax.data.output import contact_sheet, read_latents
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError, report_errors
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.loop import train
from arcflow_jax.training.recipe import Recipe, read_config
from tests.helpers.command_line import assert_refused, run

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    return shutil.copytree(tiny_flux, tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture(scope="module")
def student(model, tmp_path_factory) -> Path:
    """The adapter before the first training step."""
    config = read_config(
        TINY,
        [
            f"--config.model={model}",
            f"--config.prompts={ASSETS / 'shapes' / 'prompts-test.txt'}",
            f"--config.out={tmp_path_factory.mktemp('run') / 'student'}",
            "--config.steps=0",
            "--config.preview_every=0",
            "--config.mesh=(1, 1, 1, 1)",
        ],
    )
    return train(Recipe.from_config(config))


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(name, command) of all commands, those of groups too."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: " ".join(value) if value is tuple else None)
def test_help_explains_every_option(capfd, name, command):
    code, stdout, _ = run(capfd, *name, "--help")
    assert code == 0
    assert command.help
    assert command.params
    for option in command.params:
        assert option.help, option.name
        assert len(option.help) > 10, option.help
        shown = option.metavar if option.param_type_name == "argument" else option.opts[0]
        assert re.search(rf"^ +{shown}\b", stdout, re.MULTILINE), option.name


def test_commands_share_the_sampling_options():
    names = {" ".join(name): [option.name for option in command.params] for name, command in commands()}
    shared = [field.name for field in dataclasses.fields(SamplingOptions)]
    for command in ("sample", "evaluate metrics", "evaluate export"):
        assert [name for name in names[command] if name in shared] == shared


@dataclasses.dataclass(frozen=True)
class Shape:
    sides: Annotated[int, typer.Option(help="Number of sides.")] = 3
    filled: Annotated[bool, typer.Option("--filled", help="Draw more than the outline.")] = False


def test_a_group_of_options_becomes_one_object():
    made = []

    def draw(name: Annotated[str, typer.Argument()], *, shape: Shape) -> None:
        made.append((name, shape))

    tool = typer.Typer()
    tool.command()(expand_options(draw))
    for arguments in (["a", "--sides", "4", "--filled"], ["b"]):
        tool(arguments, standalone_mode=False)
    assert made == [("a", Shape(4, True)), ("b", Shape(3, False))]


def test_an_error_is_one_line_unless_its_traceback_is_asked_for(capfd, tmp_path, monkeypatch):
    arguments = ("train", "--config", TINY, "--config.model=/nowhere", f"--config.out={tmp_path / 'run'}")
    assert_refused(capfd, tmp_path, *arguments, message="does not exist")
    monkeypatch.setenv("ARCFLOW_TRACEBACK", "1")
    code, _, stderr = run(capfd, *arguments)
    assert code == 2
    assert "Traceback (most recent call last)" in stderr
    assert stderr.splitlines()[-1].startswith("error: ")


def test_a_traceback_shows_hidden_causes(capfd, monkeypatch):
    monkeypatch.setenv("ARCFLOW_TRACEBACK", "1")

    def fail() -> None:
        try:
            int("x")
        except ValueError:
            raise UserError("not a number") from None

    with pytest.raises(SystemExit), report_errors():
        fail()
    assert "invalid literal for int()" in capfd.readouterr().err


def test_devices_that_do_not_start(tiny_flux):
    command = [sys.executable, "-m", "arcflow_jax", "sample", "--model", tiny_flux, "--teacher", "--prompt", "a ring"]
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX finds no device: Unable to initialize backend 'nowhere'")
    assert len(done.stderr.splitlines()) == 1


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="bad"):
        raise UserError("bad")


def test_tools_are_the_same_entry_points(tmp_path):
    for tool in ("convert", "train", "embed_prompts", "sample", "demo", "evaluate"):
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / f"{tool}.py", "--help"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "--help" in done.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--steps", "0"), "num_inference_steps is 0, but has to be a whole number from 1"),
        (("--guidance", "nan"), "guidance_scale is nan"),
        (("--strength", "0"), "strength is 0"),
        (("--strength", "0.5"), "--strength is for an image to start from: give --image as well"),
        (("--mask", "mask.png"), "--mask is for an image to start from: give --image as well"),
        (("--height", "-8"), "height is -8"),
    ],
)
def test_sample_refuses_bad_settings_before_it_loads(capfd, tmp_path, option, message):
    command = ("sample", "--model", str(tmp_path / "nowhere"), "--teacher", "--prompt", "a fox", *option)
    assert_refused(capfd, tmp_path, *command, message=message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.optimiser.lr=1", "a recipe has no key 'optimiser': did you mean optimizer"),
        ("--config.steps=many", "steps is 'many', but has to be a whole number"),
        ("--steps=3", r"cannot read --steps=3: overrides have the form --config\.key=value"),
        ("steps=3", r"cannot read steps=3"),
        (
            "--config.distillation.nfe=0",
            r"--config\.distillation\.nfe is 0, but has to be a whole number from 1",
        ),
        ("--config.batch=0", r"--config\.batch is 0, but has to be a whole number from 1 to 65536"),
        ("--config.seed=-1", r"--config\.seed is -1, but has to be a whole number from 0 to 18446744073709551615"),
        ("--config.resolutions=(64, 64)", r"resolutions is \(64, 64\), but has to be a list of sizes"),
        ("--config.resolutions=()", r"resolutions is \(\), but has to be a list of sizes"),
        ("--config.model=/nowhere", "model /nowhere does not exist"),
    ],
)
def test_train_refuses_bad_settings(capfd, tmp_path, override, message):
    out = f"--config.out={tmp_path / 'run'}"
    assert_refused(capfd, tmp_path, "train", "--config", TINY, out, override, message=message)


def test_train_refuses_bad_recipes(capfd, tmp_path):
    assert_refused(capfd, tmp_path, "train", "--config", "missing.py", message=r"recipe missing\.py does not exist")
    assert_refused(
        capfd, tmp_path, "train", "--config", f"{TINY}:cubic", message="known variants are arcflow, linear, legendre"
    )


def test_train_refuses_bad_inputs(capfd, tmp_path, model):
    def refused(message: str, *overrides: str) -> None:
        common = (f"--config.model={model}", f"--config.out={tmp_path / 'run'}", "--config.steps=1")
        assert_refused(capfd, tmp_path, "train", "--config", TINY, *common, *overrides, message=message)

    prompts = f"--config.prompts={ASSETS / 'shapes' / 'prompts-test.txt'}"
    refused("nothing.txt is missing", "--config.prompts=nothing.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    refused("holds no prompts", f"--config.prompts={empty}")
    refused(
        "image size 60x64: height and width have to be positive multiples of 16",
        prompts,
        "--config.resolutions=((60, 64),)",
    )
    refused("mesh data=3 needs 3 devices, but 1 device is visible", prompts, "--config.mesh=(3, 1, 1, 1)")
    refused("nowhere holds no embeddings", prompts, "--config.embeddings=nowhere")
    refused("LoRA target 'mlp' matches no linear layer", prompts, "--config.adapter.targets=('mlp',)")
    file = tmp_path / "file"
    file.write_text("")
    refused("cannot write .* is not a directory", prompts, f"--config.out={file / 'run'}")


def test_embed_prompts_refuses_bad_inputs(capfd, tmp_path, model):
    common = ("embed-prompts", "--config", TINY, f"--config.model={model}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")

    def refused(message: str, *arguments: object) -> None:
        assert_refused(capfd, tmp_path, *common, *arguments, message=message)

    refused("full exists already", "--out", tmp_path / "full")
    refused("is not a directory", "--out", tmp_path / "full" / "file" / "out")
    refused("nothing.txt is missing", "--out", tmp_path / "out", "--config.prompts=nothing.txt")
    refused("model /nowhere does not exist", "--out", tmp_path / "out", "--config.model=/nowhere")


def test_sample_writes_images_with_their_settings(capfd, tmp_path, model, student):
    arguments = ("--model", model, "--adapter", student, "--seed", 5, "--out", tmp_path)
    (tmp_path / "0000-seed5-2steps-student-a-red-circle.png").write_text("of another call")
    code, stdout, stderr = run(capfd, "sample", *arguments, "--prompt", "a red circle", "--prompt", "a blue square")
    assert code == 0, stderr
    first, second = map(Path, stdout.split())
    assert first.name == "0000-seed5-2steps-student-a-red-circle-2.png"
    assert second.name == "0001-seed5-2steps-student-a-blue-square.png"
    assert (tmp_path / "0000-seed5-2steps-student-a-red-circle.png").read_text() == "of another call"
    with Image.open(second) as image:
        assert image.size == (64, 64)
        assert image.text["prompt"] == "a blue square"
        assert image.text["seed"] == "5"
        assert image.text["adapter"] == str(student)
        assert image.text["base"] == ModelDirectory.open(model).fingerprint
        assert image.text["steps"] == "2"
        assert (image.text["height"], image.text["width"]) == ("64", "64")


def test_sample_from_files_and_on_one_sheet(capfd, tmp_path, model, student):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue ring\n")
    noise = np.random.default_rng(0).standard_normal((4, 16, 16), np.float32)
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    np.save(tmp_path / "noise.npy", noise)
    pictures = []
    for suffix in ("safetensors", "npy"):
        out = tmp_path / suffix
        code, stdout, stderr = run(
            capfd,
            *("sample", "--model", model, "--adapter", student, "--out", out, "--images", 2, "--grid"),
            *("--prompts-file", tmp_path / "prompts.txt", "--latents", tmp_path / f"noise.{suffix}"),
        )
        assert code == 0, stderr
        *paths, grid = map(Path, stdout.split())
        assert [path.name for path in paths[1:3]] == [
            "0001-2steps-student-a-red-circle.png",
            "0002-2steps-student-a-blue-ring.png",
        ]
        pictures.append([np.asarray(Image.open(path)) for path in paths])
        with Image.open(paths[3]) as image:
            assert image.text["latents"] == str(tmp_path / f"noise.{suffix}")
            assert "seed" not in image.text
        sheet = np.asarray(Image.open(grid))
        np.testing.assert_array_equal(sheet[:64, -64:], pictures[-1][1])  # a row a prompt
        np.testing.assert_array_equal(sheet[-64:, :64], pictures[-1][2])
        assert sheet.shape == (132, 132, 3)
    np.testing.assert_array_equal(*pictures)


def test_sample_converts_a_pytorch_model(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("ARCFLOW_CACHE", str(tmp_path / "cache"))
    arguments = ("--teacher", "--steps", 1, "--height", 32, "--width", 32, "--prompt", "a ring")
    paths = []
    for out in ("one", "two"):
        code, stdout, stderr = run(
            capfd, "sample", "--model", ASSETS / "tiny-flux", *arguments, "--out", tmp_path / out
        )
        assert code == 0, stderr
        paths.append(Path(stdout.strip()))
    (model,) = (path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir())
    with Image.open(paths[0]) as one, Image.open(paths[1]) as two:
        assert one.text["model"] == two.text["model"] == str(model)
        np.testing.assert_array_equal(one, two)


def test_contact_sheet():
    images = [Image.new("RGB", (6, 4), (i, 0, 0)) for i in range(5)]
    sheet = np.asarray(contact_sheet(images, gap=1))
    assert sheet.shape == (9, 20, 3)  # two rows of three
    assert sheet[0, 14].tolist() == [2, 0, 0]
    assert sheet[5, 7].tolist() == [4, 0, 0]
    assert (sheet[5, 14] == 255).all()
    assert contact_sheet(images[:1]).size == (6, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", b"123", "x.safetensors is truncated or corrupt: "),
        ("x.npy", b"123", "cannot read latents from .*x.npy: "),
        ("x.pt", b"123", r"x\.pt: the file has to be \.safetensors or \.npy"),
        ("x.npy", None, "x.npy is missing"),
        ("x.safetensors", save({"a": np.zeros(1), "b": np.zeros(1)}), "the file has to hold one tensor, not 2"),
    ],
)
def test_latents_files_that_do_not_fit(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_latents(tmp_path / name)


def test_no_pickle_is_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read latents"):
        read_latents(tmp_path / "x.npy")


@pytest.mark.slow
def test_sample_refuses_bad_input(capfd, tmp_path, monkeypatch, model, student):
    load, loaded = ArcFlowPipeline.from_pretrained, {}

    def load_once(model: object, adapter: object, *, mesh: str, **settings: object) -> ArcFlowPipeline:
        key = str(model), str(adapter), mesh
        if key not in loaded:
            loaded[key] = load(model, adapter, mesh=mesh, **settings)
        return loaded[key]

    monkeypatch.setattr(ArcFlowPipeline, "from_pretrained", load_once)

    def refused(message: str, *arguments: object) -> None:
        assert_refused(capfd, tmp_path, "sample", "--out", tmp_path / "out", *arguments, message=message)

    whole = ("--model", model, "--adapter", student)
    refused("a prompt is empty", *whole, "--prompt", " ")
    refused("positive multiples of 16", *whole, "--prompt", "a ring", "--height", 65)
    for option, value, message in (
        ("--steps", 0, "num_inference_steps is 0, but has to be a whole number from 1 to 10000"),
        ("--steps", 10**9, "num_inference_steps is 1000000000, but has to be a whole number from 1 to 10000"),
        ("--guidance", "nan", "guidance_scale is nan, but has to be a number from 0 to 1000"),
        ("--guidance", "inf", "guidance_scale is inf, but has to be a number from 0 to 1000"),
        ("--guidance", -1e30, r"guidance_scale is -1e\+30, but has to be a number from 0 to 1000"),
        ("--height", 0, "height is 0, but has to be a whole number from 1 to 65536"),
        ("--width", 10**12, "width is 1000000000000, but has to be a whole number from 1 to 65536"),
        ("--seed", -1, "seed is -1, but has to be a whole number from 0 to 18446744073709551615"),
        ("--images", 0, "num_images_per_prompt is 0, but has to be a whole number from 1 to 65536"),
        ("--images", 10**9, "num_images_per_prompt is 1000000000, but has to be a whole number"),
        ("--final-step-ratio", "nan", "final_step_ratio is nan, but has to be a number from 0.001 to 1000"),
    ):
        refused(message, *whole, "--prompt", "a ring", option, value)
    refused("name the student with --adapter", "--model", model, "--prompt", "a ring")
    refused("either with --prompt or with --prompts-file", *whole)
    refused("either with --prompt or with --prompts-file", *whole, "--prompt", "a ring", "--prompts-file", "x.txt")
    refused("nothing.txt is missing", *whole, "--prompts-file", "nothing.txt")
    refused("the file has to be .safetensors or .npy", *whole, "--prompt", "a ring", "--latents", "x.bin")
    refused("'heads=2' is not AXIS=SIZE", *whole, "--prompt", "a ring", "--mesh", "heads=2")
    refused("batch_size is 0", *whole, "--prompt", "a ring", "--batch-size", 0)
    refused("final_step_ratio is -1.0", *whole, "--prompt", "a ring", "--final-step-ratio", -1)
    refused("leave --adapter out", *whole, "--teacher", "--prompt", "a ring")
    refused("does not exist", "--model", tmp_path / "none", "--teacher", "--prompt", "a ring")
    refused("holds no adapter", "--model", model, "--adapter", tmp_path, "--prompt", "a ring")
    file = tmp_path / "file"
    file.write_text("")
    refused("cannot write .*out", *whole, "--prompt", "a ring", "--out", file / "out")


def test_the_default_is_the_demo(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "there is no demo in runs/demo: run arcflow demo first, or name --model and --adapter"
    assert_refused(capfd, tmp_path, "sample", "--prompt", "a ring", message=message)


@pytest.mark.parametrize("option", ["--raw", "--no-merge", "--merge", "--adapter=a", "--adapter-scale=0.5"])
def test_a_teacher_has_no_students_options(capfd, tmp_path, option):
    command = ("sample", "--model", tmp_path, "--teacher", "--prompt", "a ring", option)
    name = option.partition("=")[0]
    assert_refused(capfd, tmp_path, *command, message=f"samples without a student: leave {name} out")


def test_sample_refuses_an_adapter_of_another_base(capfd, tmp_path, model, student):
    description = AdapterDescription.read(student)
    other = tmp_path / "other"
    other.mkdir()
    AdapterDescription("0" * 64, description.adapter, description.distillation, description.guidance).write(other)
    fingerprint = ModelDirectory.open(model).fingerprint[:12]
    message = f"was trained on base 000000000000…, this model is {fingerprint}…"
    arguments = ("--model", model, "--adapter", other, "--prompt", "a ring", "--out", tmp_path / "out")
    assert_refused(capfd, tmp_path, "sample", *arguments, message=message)
