"""The demo's images and captions, its judge, its figures and its report."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from arcflow_jax.cli.reports import Teacher
from arcflow_jax.data.prompts import Prompts, read_prompts
from arcflow_jax.demo import ASSETS, report, run, shapes
from arcflow_jax.demo import evaluate as evaluation
from arcflow_jax.demo.evaluate import BATCH, SEED, Results, Sampler, diversity, run_samplers
from arcflow_jax.demo.judge import agreement
from arcflow_jax.demo.run import TEACHERS, bars
from arcflow_jax.demo.shapes import WORLD, Caption
from arcflow_jax.demo.trajectory import Film
from arcflow_jax.demo.world import TRUE_FEATURES
from arcflow_jax.errors import UserError
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.pipeline import ArcFlowPipeline
from tools.make_tiny_qwen import make_tiny_qwen
from tools.tiny_teacher.measure import make_true_features
from tools.tiny_teacher.shapes import SHAPES


def test_captions_map_to_words():
    caption = Caption(shape=3, colour=1, position=0, size=1, background=2)
    assert str(caption) == "a large green ring on the left on a black background"
    assert str(Caption(shape=0, colour=0, position=4)) == "a red circle in the center"


def test_prompt_files_share_no_caption():
    train, test = (read_prompts(file).texts for file in (WORLD.train_prompts, WORLD.test_prompts))
    assert (len(train), len(test)) == (2048, 512)
    assert not set(train) & set(test)
    assert {*train, *test} <= {str(caption) for caption in shapes.CAPTIONS.all()}
    omitted = np.mean([WORLD.captions.of(prompt).as_array() < 0 for prompt in test], axis=0)
    np.testing.assert_allclose(omitted, [shapes.OMITTED.get(name, 0) for name in shapes.ATTRIBUTES], atol=0.1)


def test_diversity_tells_a_sampler_that_ignores_the_seed(monkeypatch):
    captions = [Caption(0, 1, 2), Caption(3, 4, 0), Caption(1, 2, 3)]  # size and background are left open
    made = {}

    def rendered(samplers: object, repeated: list[Caption], *_: object) -> dict[str, Results]:
        asked = jnp.array([caption.as_array() for caption in repeated])
        images = np.asarray(shapes.render(jax.random.key(0), asked)).reshape(3, BATCH, *2 * (shapes.SIDE,), 3)
        pixels = np.round((images + 1) * 127.5).astype(np.uint8)
        made.update({"all": pixels, "one": pixels[:, :1].repeat(BATCH, 1)})
        return {name: Results(pixels=list(batches)) for name, batches in made.items()}

    monkeypatch.setattr(evaluation, "run_samplers", rendered)
    found = diversity(WORLD, {}, captions, guidance=1.0)
    distances = []
    for batch in made["all"]:
        features = WORLD.read(batch / 127.5 - 1)[0].astype(np.float64)
        pairs = itertools.combinations(features / np.linalg.norm(features, axis=1, keepdims=True), 2)
        distances.append(np.mean([1 - a @ b for a, b in pairs]))
    assert found["all"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert found["all"] > 0.01
    assert found["one"] == pytest.approx(0, abs=1e-9)


def test_images_show_what_was_asked():
    attributes = jnp.array([[1, 2, 0, 1, 0], [0, 0, 3, 0, 2], [3, 1, 4, 1, 1]])  # square, circle, ring
    drawn = np.asarray((shapes.render(jax.random.key(1), attributes) + 1) / 2)
    for image, (_, colour, _, _, background) in zip(drawn, np.asarray(attributes), strict=True):
        low, high = shapes.LIGHTNESS[background]
        assert ((low <= image[0, 0]) & (image[0, 0] <= high)).all()
        assert np.isclose(image, shapes.COLOUR_RGB[colour], atol=1e-5).all(-1).any()
    rows, columns = np.nonzero(np.isclose(drawn[0], shapes.COLOUR_RGB[2], atol=1e-5).all(-1))
    assert columns.mean() < 25  # on the left
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a square is full
    ring = np.isclose(drawn[2], shapes.COLOUR_RGB[1], atol=1e-5).all(-1)
    assert not ring[30:34, 30:34].any()
    edge = drawn[1].reshape(-1, 3)
    between = (edge[:, 0] > 0.2) & (edge[:, 0] < 0.8)
    assert between.sum() > 10  # antialiased


def test_omitted_attributes_take_values_between_the_named_ones():
    drawn = np.asarray((shapes.render(jax.random.key(2), jnp.array([[0, 0, 4, -1, -1]] * 500)) + 1) / 2)
    lightness = drawn[:, 0, 0, 0]
    assert lightness.min() < 0.1
    assert lightness.max() > 0.92
    assert ((lightness > 0.2) & (lightness < 0.4)).sum() > 50
    red = np.isclose(drawn, shapes.COLOUR_RGB[0], atol=1e-5).all(-1)
    wide = np.sqrt(red.sum((1, 2)) / np.pi)  # radius of a disc of that area
    assert wide.min() < 11
    assert wide.max() > 17.5
    assert ((wide > 13) & (wide < 15.5)).sum() > 50


@pytest.mark.slow
def test_true_features_are_those_of_rendered_images(tmp_path):
    for file in WORLD.folder.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / TRUE_FEATURES).unlink()
    make_true_features(tmp_path, SHAPES)
    again = dataclasses.replace(WORLD, folder=tmp_path).true_features
    assert again.count == WORLD.true_features.count
    np.testing.assert_allclose(WORLD.true_features.mean, again.mean, atol=1e-3)
    np.testing.assert_allclose(WORLD.true_features.covariance, again.covariance, atol=1e-3)


def test_agreement_counts_requested_attributes():
    asked = np.array([[0, 1, -1, -1, 2], [1, 1, 3, -1, -1]])
    read = np.array([[0, 2, 4, 1, 2], [1, 1, 0, 0, 0]])
    shares = agreement(read, asked, shapes.ATTRIBUTES)
    assert shares == {"shape": 1.0, "colour": 0.5, "position": 0.0, "background": 1.0, "mean": 4 / 6}


def figure(error: float, agreement: float = 0.95, seconds: float = 0.002) -> dict:
    kinds = dict.fromkeys(shapes.ATTRIBUTES, agreement)
    return {
        "endpoint_error": error,
        "frechet_distance": 1.0,
        "prompt_agreement": agreement,
        "prompt_agreement_by_attribute": kinds,
        "denoise_seconds_per_image": seconds,
        "seconds_per_image": seconds + 0.001,
    }


def test_bars_are_reached_or_missed():
    figures = {
        "teacher_50": figure(0.0, 0.96, 0.05),
        "teacher_2": figure(0.4),
        "teacher_4": figure(0.12),
        "arcflow_2": figure(0.09),
    }
    assert [bar["reached"] for bar in bars(figures)] == [True, True, True, True]
    figures["arcflow_2"] = figure(0.15, 0.9, 0.003)
    assert [bar["reached"] for bar in bars(figures)] == [False, False, False, False]


def test_report_is_one_page_with_everything(tmp_path):
    rng = np.random.default_rng(0)
    captions = shapes.CAPTIONS.all()[:4]
    results = {
        name: Results(pixels=[rng.integers(0, 256, (2, 64, 64, 3), np.uint8) for _ in range(2)])
        for name in report.LABELS
    }
    metrics = {name: figure(0.1 * i, seconds=0.05 / (i + 1)) for i, name in enumerate(report.LABELS)}
    metrics |= {"bars": bars(metrics), "teacher": "tiny-none", "prompts": 4, "training_steps": 10, "date": "2026-01-01"}
    metrics["machine"] = "a <machine>"
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2, 2, 3)))
    frames = rng.integers(0, 256, (2, 3, 4, 64, 64, 3), np.uint8)  # of teacher and student, at three noise levels
    film = Film(np.array([1.0, 0.5, 0.0]), *frames, rng.uniform(size=(3, 4)))
    report.write(tmp_path, metrics, results, captions, film, log)

    page = (tmp_path / "index.html").read_text()
    assert "$" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # the page loads nothing from elsewhere
    assert "a &lt;machine&gt;" in page
    assert "the bundled teacher tiny-none" in page
    assert all(label in page for label in report.LABELS.values())
    assert page.count("<polyline") == 1
    assert page.count('class="frame"') == 8
    assert f"σ = 0.50, distance {film.distance[1].mean():.4f}" in page
    (sheet,) = re.findall(r"url\(data:image/jpeg;base64,([^)]+)\)", page)
    with Image.open(io.BytesIO(base64.b64decode(sheet))) as image:
        assert image.size == (3 * 64, 8 * 64)
    with Image.open(tmp_path / "grid.png") as grid:
        cell = np.asarray(grid.crop((report.LEFT, report.TOP, report.LEFT + report.CELL, report.TOP + report.CELL)))
    np.testing.assert_array_equal(cell[::2, ::2], results["teacher_50"].pixels[0][0])


def test_teacher_uses_cfg_with_a_negative_prompt(tiny_qwen):
    pipeline = ArcFlowPipeline.from_pretrained(tiny_qwen)
    captions = shapes.CAPTIONS.all()[:2]
    noise = pipeline.noise(SEED, 2, *pipeline.grid())
    prompts, samplers = list(map(str, captions)), {"two": Sampler(pipeline, steps=2)}
    for negative, settings in ((None, {}), ("", {"guidance_scale": 3.0, "negative_prompt": ""})):
        made = run_samplers(samplers, captions, 3.0, negative)["two"].pixels[0]
        expected = np.stack(pipeline(prompts, num_inference_steps=2, latents=noise, batch_size=2, **settings).images)
        np.testing.assert_allclose(made.astype(int), expected, atol=1)
    assert (
        np.abs(expected - np.stack(pipeline(prompts, num_inference_steps=2, latents=noise, batch_size=2).images)).max()
        > 5
    )


@pytest.mark.slow
def test_a_directory_of_another_teacher_is_refused(tmp_path):
    """A teacher is identified by its weights and settings, not by the kind of its pipeline."""
    out, source, other = tmp_path / "out" / "teacher", make_tiny_qwen(tmp_path / "qwen"), tmp_path / "other"
    made = run.convert(source, out, None)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run.convert(source, out, None).fingerprint == made.fingerprint
    shutil.copytree(source, other)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"latents_std": [1.0] * 4}))
    for teacher, quantize in ((other, None), (ASSETS / "tiny-flux", None), (source, "int8")):
        what = f"{teacher.name} in int8" if quantize else teacher.name
        refusal = f"{out} was not converted from the bundled {what}: choose another --out, or remove {out.parent}"
        with pytest.raises(UserError, match=refusal):
            run.convert(teacher, out, quantize)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "quantize"), [("tiny-emoji", None), ("tiny-qwen", "int8")])
def test_whole_demo_in_few_steps(tmp_path, monkeypatch, teacher, quantize):
    """Two training steps, a teacher of 16 steps, the prompts of the grid: nothing is learned, all is written."""
    recipe = run.recipe
    monkeypatch.setattr(run, "recipe", lambda *args: dataclasses.replace(recipe(*args), steps=2))

    def few(file: Path) -> Prompts:
        prompts = read_prompts(file)
        return dataclasses.replace(prompts, texts=prompts.texts[:9])

    monkeypatch.setattr(run, "read_prompts", few)
    monkeypatch.setattr(run, "TEACHER_STEPS", 16)
    metrics = run.demo(tmp_path / "demo", teacher, quantize)
    assert (metrics["prompts"], metrics["training_steps"]) == (9, 2)
    assert metrics["base"] == ModelDirectory.open(tmp_path / "demo" / "teacher").fingerprint
    assert metrics["teacher_50"]["endpoint_error"] == 0
    assert metrics["teacher_50"]["prompt_agreement"] > 0.9
    assert metrics["teacher_2"]["endpoint_error"] > 0.05
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == metrics
    assert (tmp_path / "demo" / "index.html").is_file()
    with Image.open(tmp_path / "demo" / "grid.png") as grid:
        assert grid.width > report.LEFT + 9 * report.CELL


def test_command_line_knows_every_teacher():
    assert [teacher.value for teacher in Teacher] == list(TEACHERS)
