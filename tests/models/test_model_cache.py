"""PyTorch models that the pipeline converts on first use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.models import conversion
from arcflow_jax.models.model_cache import converted
from arcflow_jax.models.model_directory import ModelDirectory
from tests.helpers import fake_hub
from tests.helpers.source_folder import write_source


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pytorch") / "source"
    write_source(folder)
    return folder


@pytest.fixture
def source(written, tmp_path) -> Path:
    """A folder that a test may change."""
    folder = tmp_path / "source"
    folder.mkdir()
    for path in written.rglob("*"):
        target = folder / path.relative_to(written)
        target.mkdir() if path.is_dir() else os.link(path, target)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ARCFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def conversions(monkeypatch) -> list:
    """The sources that were converted."""
    converted, convert_model = [], conversion.convert_model

    def counted(source, *args, **kwargs):
        converted.append(str(source))
        return convert_model(source, *args, **kwargs)

    monkeypatch.setattr(conversion, "convert_model", counted)
    return converted


def test_a_folder_is_converted_once(source, cache, conversions):
    model = converted(source)
    assert model.parent == cache
    assert ModelDirectory.open(model).description.pipeline == "FluxPipeline"
    assert converted(str(source)) == model
    assert converted(source / ".." / source.name) == model
    assert conversions == [str(source)]


def test_a_changed_folder_is_another_model(source, cache, conversions):
    model = converted(source)
    config = source / "scheduler" / "scheduler_config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text.replace("3.0", "5.0"))
    changed = converted(source)
    assert changed != model
    assert ModelDirectory.open(changed).scheduler.shift == 5.0
    assert len(conversions) == 2


def test_a_model_directory_is_taken_as_it_is(source, cache, conversions):
    model = converted(source)
    assert converted(model) == model
    assert len(conversions) == 1


def test_a_hub_id_is_converted_once_per_commit(source, cache, conversions, tmp_path, monkeypatch):
    with fake_hub.serving(source, tmp_path / "hub", monkeypatch) as fake:
        model = converted(fake_hub.ID)
        fetched = list(fake.fetched)
        assert "transformer/config.json" in fetched
        assert converted(fake_hub.ID) == model
        assert fake.fetched == fetched
        monkeypatch.setattr(fake_hub, "SHA", "f" * 40)
        assert converted(fake_hub.ID) != model
    assert conversions == [fake_hub.ID] * 2


def test_nothing_half_converted_stays(source, cache):
    weights = source / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model\.safetensors is truncated or corrupt"):
        converted(source)
    assert not cache.exists()


def test_no_such_model(cache, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist, and a hub id is owner/name"):
        converted(tmp_path / "nowhere")


def test_a_cache_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARCFLOW_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write"):
        converted(source)
