"""Any bytes in the place of a file give a student or a model that is the good one, or a UserError."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from tests.hostile import good, models, students
from tests.hostile.case import Case, run

# Whole noise, and noise that begins as the good file does
NOISE = strategies.tuples(strategies.floats(0, 1), strategies.binary(max_size=300))
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def replaced(source: Path, name: str, noise: tuple[float, bytes], folder: Path) -> Path:
    """A copy with noise in one of its files, from some place on."""
    copy = good.copy(source, folder / "in" / "copy")
    before = (copy / name).read_bytes()
    good.put(copy / name, before[: int(noise[0] * len(before))] + noise[1])
    return copy


@pytest.mark.parametrize("kind", good.KINDS)
@pytest.mark.parametrize("name", ["adapter.json", "diffusion_pytorch_model.safetensors", "config.json"])
@FEW
@given(noise=NOISE)
def test_a_student_is_the_good_one_or_refused(kind, name, noise):
    source = good.run(kind) if name == "adapter.json" else good.export(kind)
    with tempfile.TemporaryDirectory() as folder:
        copy = replaced(source, name, noise, Path(folder))
        case = Case(name, lambda: students.read(kind, copy), [str(copy)], wrong=lambda found: differs(kind, found))
        assert run(case).outcome in ("told", "right"), run(case)


def differs(kind: str, found) -> str | None:
    return None if good.same_arrays(found[1], students.best(kind)[1]) else "other weights"


@pytest.mark.parametrize("kind", good.KINDS)
@FEW
@given(noise=NOISE, number=strategies.integers(0, 10**6))
def test_a_component_is_the_good_one_or_refused(kind, noise, number):
    folder = good.model(kind) / "vae"
    files = sorted(path.relative_to(good.model(kind)) for path in folder.rglob("*") if path.is_file())
    name = str(random.Random(number).choice([Path("model.json"), *files]))
    with tempfile.TemporaryDirectory() as place:
        copy = replaced(good.model(kind), name, noise, Path(place))

        def load():
            return models.ModelDirectory.open(copy).load("vae", models.abstract(kind, "vae"))

        def wrong(found) -> str | None:
            return None if good.same_arrays(found, models.weights(kind, "vae")) else "other weights"

        case = Case(name, load, [str(copy)], wrong=wrong)
        assert run(case).outcome in ("told", "right"), run(case)
