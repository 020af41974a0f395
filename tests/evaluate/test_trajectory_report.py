"""The trajectory report of whole models: against the pipeline, in batches, killed and resumed, on several devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from arcflow_jax.checkpoints.training import AdapterDescription, Checkpoints
from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.trajectory import comparison as comparison_module
from arcflow_jax.evaluate.trajectory.comparison import Comparison, ComparisonSettings, compare_models
from arcflow_jax.evaluate.trajectory.report import PARTIAL, PLOT, REPORT, Tally, evaluate, read_partial
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.generate import sample_student
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.conditioning import Guided
from arcflow_jax.networks.student import AdapterConfig, split_model
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.state import TrainState
from tests.helpers.command_line import assert_refused, run
from tests.helpers.fake_comparison import FakeComparison
from tests.helpers.processes import child, with_devices

PROMPTS = ["a red circle", "a large green ring", "a blue square on the left"]
SETTINGS = ComparisonSettings(teacher_steps=6, seed=3, height=32, width=96)
OPTIONS = ("--teacher-steps", 6, "--seed", 3, "--height", 32, "--width", 96)
FLUX_TARGETS = ("transformer_blocks.ff.*", "single_transformer_blocks.proj_out")


def write_student(model: Path, run: Path, targets: tuple[str, ...], distillation: Distillation, basis: str) -> Path:
    """Writes what a training run leaves, with random weights."""
    adapter = AdapterConfig(modes=3, rank=2, alpha=4.0, dropout=0.0, targets=targets, basis=basis)
    directory = ModelDirectory.open(model)
    _, _, abstract = split_model(directory.student(adapter, jnp.float32))
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: jnp.asarray(0.05 * rng.standard_normal(x.shape), x.dtype), abstract)
    run.mkdir()
    AdapterDescription(directory.fingerprint, adapter, distillation, guidance=2.0).write(run)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(0, TrainState.create(values, optax.identity()).items())
    return run


@pytest.fixture(scope="module")
def model(tiny_flux) -> Path:
    return tiny_flux


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trajectory")


@pytest.fixture(scope="module")
def student(model, folder) -> Path:
    return write_student(model, folder / "student", FLUX_TARGETS, Distillation(shift=2.0), "momentum")


@pytest.fixture(scope="module")
def prompts(folder) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def report(model, student, folder) -> dict:
    """The report on three prompts in batches of two."""
    before = compare_models._cache_size()
    found = evaluate(Comparison(model, student, SETTINGS, batch_size=2), PROMPTS, folder / "report")
    assert compare_models._cache_size() == before + 1  # the last batch is filled up, so it compiles nothing new
    return found


def endpoint_errors(model: Path, student: Path, negative: str | None = None) -> np.ndarray:
    """Mean square distance between what the pipeline makes with student and with teacher, for two prompts."""
    teacher, few = ArcFlowPipeline.from_pretrained(model), ArcFlowPipeline.from_pretrained(model, student)
    rows, columns = teacher.grid(SETTINGS.height, SETTINGS.width)
    conditioning = few.encode(PROMPTS[:2], guidance=2.0, rows=rows, columns=columns)
    noise = few.noise(SETTINGS.seed, 2, rows, columns)
    guided = conditioning
    if negative is not None:
        away = few.encode([negative] * 2, guidance=2.0, rows=rows, columns=columns)
        guided = Guided(conditioning, away, jnp.float32(2.0), norm_preserving=False)
    made = few.denoise(noise, conditioning, 2) - teacher.denoise(noise, guided, SETTINGS.teacher_steps)
    return np.square(made).mean((1, 2))


@pytest.mark.slow
def test_endpoint_is_that_of_the_pipeline(report, model, student):
    np.testing.assert_allclose(report["endpoint"]["student"]["each"][:2], endpoint_errors(model, student), rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_samples_what_the_unmerged_sampler_samples(monkeypatch, model, student):
    """In bfloat16 small updates of a merged LoRA vanish in rounding; here that would change the errors by 1e-4."""
    monkeypatch.setattr(comparison_module, "default_dtype", lambda: jnp.bfloat16)
    compared = Comparison(model, student, SETTINGS, batch_size=2)
    sizes, _ = compared(PROMPTS[:2], 0)
    teacher = ArcFlowPipeline.from_pretrained(model, dtype=jnp.bfloat16)
    conditioning = teacher.encode(PROMPTS[:2], guidance=2.0, rows=compared.rows, columns=compared.columns)
    noise = teacher.noise(SETTINGS.seed, 2, compared.rows, compared.columns)
    shift, ratio = jnp.float32(2.0), jnp.float32(1.0)
    few = sample_student(compared.graphdef, compared.state, noise, conditioning, shift, ratio, steps=2)
    dense = teacher.denoise(noise, conditioning, SETTINGS.teacher_steps)
    expected = np.square(np.asarray(few - dense)).mean((1, 2))
    np.testing.assert_allclose(sizes["state"]["total"][-1], expected, rtol=1e-5)


def assert_adds_up(report: dict) -> None:
    """Parts add up to the total at every σ; a segment starts with the last one's error; the last is the endpoint's."""
    before = 0.0
    for segment in report["segments"]:
        for kind, curve in segment["curves"].items():
            parts = [curve[name] for name in ("local", "drift", "cross", "closed_form") if name in curve]
            np.testing.assert_allclose(np.sum(parts, 0), curve["total"], rtol=1e-4, atol=1e-6, err_msg=kind)
        state = segment["curves"]["state"]
        assert state["total"][0] == before
        assert state["drift"][:2] == pytest.approx([before] * 2, rel=0.5)
        assert [state["sigma"][0], state["sigma"][-1]] == segment["sigma"]
        assert segment["closed_form"] < 1e-5
        assert segment["velocity"]["total"] == pytest.approx(np.mean(segment["curves"]["velocity"]["total"]))
        before = segment["state"]["total"]
    each = report["endpoint"]["student"]["each"]
    assert report["endpoint"]["student"]["mean"] == pytest.approx(np.mean(each))
    assert before == pytest.approx(np.mean(each))
    assert report["endpoint"]["student"]["standard_error"] == pytest.approx(np.std(each, ddof=1) / len(each) ** 0.5)
    teacher = report["endpoint"]["teacher"]
    assert report["endpoint"]["relative"] == pytest.approx(np.mean(each) / np.mean(teacher["each"]))
    assert teacher["median"] == np.median(teacher["each"])


def test_figures_add_up(report, folder):
    assert len(report["segments"]) == 2
    assert report["segments"][1]["state"]["drift"] > 1e-3
    assert_adds_up(report)
    out = folder / "report"
    assert json.loads((out / REPORT).read_text()) == report
    with Image.open(out / PLOT) as plot:
        assert plot.size == (1200, 1050)
    assert sorted(path.name for path in out.iterdir()) == [REPORT, PLOT]


def same(a: dict, b: dict) -> None:
    """Equal but for rounding."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-6), *(
        {name: each[name] for name in ("endpoint", "segments")} for each in (a, b)
    ))  # fmt: skip


@pytest.mark.slow
def test_interrupted_report_resumes_with_another_batch_size(
    capfd, tmp_path, monkeypatch, report, model, student, prompts
):
    """On the command line: interrupted after a prompt, refused to another evaluation, finished, and shown again."""
    compare, seen, dies_at = Comparison.__call__, [], 1

    def watched(self, texts, first):
        if first >= dies_at:
            raise KeyboardInterrupt
        seen.append((first, len(texts)))
        return compare(self, texts, first)

    monkeypatch.setattr(Comparison, "__call__", watched)
    out = tmp_path / "out"
    command = ("evaluate", "trajectory", "--model", model, "--adapter", student, "--prompts", prompts, "--out", out)
    code, _, _ = run(capfd, *command, *OPTIONS, "--batch-size", 1)
    assert code == 130
    assert [path.name for path in out.iterdir()] == [PARTIAL]
    assert_refused(capfd, tmp_path, *command, *OPTIONS, "--seed", 4, message="another evaluation, with different seed:")
    assert_refused(capfd, tmp_path, *command, *OPTIONS, "--count", 2, message="with different prompts, prompts_sha256:")

    dies_at = 3
    code, stdout, stderr = run(capfd, *command, *OPTIONS, "--batch-size", 2)
    assert code == 0, stderr
    assert seen == [(0, 1), (1, 2)]
    assert "compared 3 of 3 prompts" in stdout
    found = json.loads((out / REPORT).read_text())
    same(found, report)
    assert found["identity"] == report["identity"]
    assert sorted(path.name for path in out.iterdir()) == [REPORT, PLOT]

    dies_at = 0
    (out / PLOT).unlink()
    found["of"] = found.pop("identity")  # its name in version 0.1
    (out / REPORT).write_text(json.dumps(found))
    code, again, stderr = run(capfd, *command, *OPTIONS)
    assert code == 0, stderr
    assert again in stdout
    assert (out / PLOT).exists()
    assert_refused(capfd, tmp_path, *command, message="another evaluation, with different teacher_steps, seed, height")


def test_bad_input(capfd, tmp_path, monkeypatch, model, student, prompts):
    whole = ("--model", model, "--adapter", student, "--prompts", prompts)

    def refused(message: str, *arguments: object) -> None:
        command = ("evaluate", "trajectory", "--out", tmp_path / "out", *arguments)
        assert_refused(capfd, tmp_path, *command, message=message)

    refused("nothing.txt is missing", "--prompts", "nothing.txt")
    refused("count is 4, but has to be from 1 to 3", *whole, "--count", 4)
    refused("count is 0, but has to be from 1 to 3", *whole, "--count", 0)
    refused("steps is 0, but has to be a whole number from 1 to 10000", *whole, "--steps", 0)
    refused("teacher_steps is -1, but has to be a whole number from 1 to 10000", *whole, "--teacher-steps", -1)
    refused("4 teacher steps are too few to compare 3 segments", *whole, "--teacher-steps", 4, "--steps", 3)
    refused("batch_size is 0, but has to be a whole number from 1 to 65536", *whole, "--batch-size", 0)
    refused("norm_preserving needs classifier-free guidance: give a negative_prompt too", *whole, "--norm-preserving")
    refused("positive multiples of 16", *whole, "--height", 65)
    refused("'heads=2' is not AXIS=SIZE, where AXIS is one of data, fsdp", *whole, "--mesh", "heads=2")
    refused("holds no adapter", "--model", model, "--adapter", tmp_path, "--prompts", prompts)
    file = tmp_path / "file"
    file.write_text("")
    refused("cannot write .*is not a directory", *whole, "--out", file / "out")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(r"plots need matplotlib: pip install matplotlib, or arcflow_jax\[eval\]", *whole)


def test_values_that_are_not_finite():
    sizes = {"state": {"total": np.array([[1.0, 1.0], [1.0, np.nan]])}}
    tally = Tally(student=[0.0], teacher=[0.0])
    with pytest.raises(UserError, match="prompt 3 gives non-finite values"):
        tally.add(Tally.from_batch(sizes, np.ones(2), 2))
    tally.add(Tally.from_batch(sizes, np.ones(2), 1))  # the second prompt only fills the batch up
    assert (tally.count, tally.student) == (2, [0.0, 1.0])


KILLED = """
import os, signal, sys
from pathlib import Path
from arcflow_jax.evaluate.trajectory.report import evaluate
from tests.helpers.fake_comparison import FakeComparison

class Killed(FakeComparison):
    def __call__(self, prompts, first):
        if first == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(prompts, first)

evaluate(Killed(batch_size=2), list("abcdefg"), Path(sys.argv[1]))
"""


def test_killed_report_resumes(tmp_path):
    """A process killed in its third batch has left two; the rest of a line that it was writing is dropped."""
    whole = evaluate(FakeComparison(batch_size=2), list("abcdefg"), tmp_path / "whole")
    with child(KILLED, tmp_path / "out") as process:
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, printed
    partial = tmp_path / "out" / PARTIAL
    assert len(partial.read_text().splitlines()) == 3
    with partial.open("a") as file:
        file.write('{"sums": {"velo')
    (tmp_path / "out" / "trajectory.partial.json").write_text("{}")  # version 0.1's, not to be read
    resumed = FakeComparison(batch_size=3)
    found = evaluate(resumed, list("abcdefg"), tmp_path / "out")
    assert resumed.firsts == [4]
    same(found, whole)
    assert not partial.exists()


def test_partial_report_cut_anywhere_keeps_its_whole_batches(tmp_path):
    path, comparison = tmp_path / PARTIAL, FakeComparison(batch_size=2)
    assert read_partial(path, {"seed": 1}).count == 0
    with path.open("a") as file:
        for first in (0, 2):
            file.write(json.dumps(Tally.from_batch(*comparison("ab", first), 2).to_json()) + "\n")
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:length])
        tally = read_partial(path, {"seed": 1})
        assert tally.count == 2 * max(0, sum(end <= length for end in ends) - 1)
        assert path.read_bytes() == whole[: max([ends[0], *(end for end in ends if end <= length)])]
    with pytest.raises(UserError, match="belongs to another evaluation, with different seed:"):
        read_partial(path, {"seed": 2})
    path.write_bytes(whole[: ends[0]] + b"{}\n" + whole[ends[0] :])
    with pytest.raises(UserError, match="line 2: missing student, sums, teacher"):
        read_partial(path, {"seed": 1})


@pytest.mark.parametrize(
    ("given", "trained", "expected"),
    [
        ({}, {}, (2.5, None)),
        ({"guidance": 1.5}, {}, (1.5, None)),
        ({"negative_prompt": ""}, {}, (4.0, "")),
        ({"negative_prompt": "blur", "guidance": 3.0}, {}, (3.0, "blur")),
        ({}, {"teacher_guidance": "cfg", "negative_prompt": "grey"}, (2.5, "grey")),
        ({"negative_prompt": ""}, {"teacher_guidance": "cfg", "negative_prompt": "grey"}, (2.5, "")),
    ],
)
def test_guidance_defaults_to_the_students(model, given, trained, expected):
    description = AdapterDescription("", AdapterConfig(3, 2, 2.0, 0.0, ()), Distillation(nfe=4, **trained), 2.5)
    settings = ComparisonSettings(**given).resolved(description, ModelDirectory.open(model).config("vae"), 4.0)
    assert (settings.guidance, settings.negative_prompt) == expected
    assert (settings.steps, settings.height, settings.width) == (4, 64, 64)


@pytest.mark.slow
def test_qwen_image_with_cfg(tmp_path, tiny_qwen):
    """With a student of another curve."""
    distillation = Distillation(shift=2.0, teacher_guidance="cfg", negative_prompt="grey")
    student = write_student(
        tiny_qwen, tmp_path / "student", ("transformer_blocks.img_mlp.*",), distillation, "legendre"
    )
    found = evaluate(Comparison(tiny_qwen, student, SETTINGS, batch_size=2), PROMPTS[:2], tmp_path / "out")
    expected = endpoint_errors(tiny_qwen, student, negative="grey")
    np.testing.assert_allclose(found["endpoint"]["student"]["each"], expected, rtol=1e-4)
    assert np.abs(endpoint_errors(tiny_qwen, student) / expected - 1).max() > 1e-3  # which the tolerance would see
    assert_adds_up(found)


@pytest.mark.slow
def test_eight_devices_find_the_same(report, model, student, prompts, tmp_path):
    """In a process with eight CPU devices."""
    options = {"model": model, "adapter": student, "prompts": prompts, "batch-size": 4}
    common = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = ["evaluate", "trajectory", *common, *map(str, OPTIONS), "--mesh", "fsdp=2,tensor=2,sequence=-1"]
    script = f"from arcflow_jax.cli.app import app; app({[*command, '--out', str(tmp_path / 'out')]!r})"
    environment = os.environ | with_devices(8)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    same(json.loads((tmp_path / "out" / REPORT).read_text()), report)
