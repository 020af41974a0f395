"""Models from the hub: huggingface_hub itself, over a transport that answers as the hub does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arcflow_jax.checkpoints import student_formats
from arcflow_jax.cli.app import main
from arcflow_jax.data.prompts import read_prompts
from arcflow_jax.errors import UserError, exit_code
from arcflow_jax.models import conversion
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.storage import hub
from tests.helpers.fake_hub import ID, http, serving
from tests.helpers.source_folder import write_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model as repositories hold it: beside the diffusers folder pickles, variants and the authors' single files."""
    folder = tmp_path_factory.mktemp("hub") / "source"
    write_source(folder)
    for name in (
        "README.md",
        "flux1-tiny.safetensors",
        "ae.safetensors",
        "transformer/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/flax_model.msgpack",
    ):
        (folder / name).write_bytes(b"not to be fetched")
    return folder


@pytest.fixture
def fake(folder, tmp_path, monkeypatch):
    with serving(folder, tmp_path / "cache", monkeypatch) as fake:
        yield fake


def test_converts_a_hub_id_and_fetches_what_it_reads(fake, folder, tmp_path, capfd):
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--source", ID, "--revision", "v1", "--out", str(tmp_path / "out")])
    assert not caught.value.code
    assert capfd.readouterr().out == f"converted {ID} to {tmp_path / 'out'}\n"
    assert sorted(fake.fetched) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    expected = conversion.convert_model(folder, tmp_path / "expected")
    assert ModelDirectory.open(tmp_path / "out").fingerprint == ModelDirectory.open(expected).fingerprint


def test_a_component_from_a_file_is_not_fetched(fake, folder, tmp_path):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    conversion.convert_model(ID, tmp_path / "out", files={"transformer": file})
    assert "transformer/config.json" in fake.fetched
    assert not any(name.startswith("transformer/diffusion") for name in fake.fetched)


def test_nothing_is_fetched_of_a_pipeline_that_is_not_supported(fake, tmp_path, folder):
    fake.folder = tmp_path / "other"
    fake.folder.mkdir()
    (fake.folder / "model_index.json").write_text('{"_class_name": "PixArtPipeline"}')
    with pytest.raises(UserError, match="is a PixArtPipeline, supported are FluxPipeline"):
        conversion.convert_model(ID, tmp_path / "out")
    assert fake.fetched == ["model_index.json"]


def refuse_files(code: int, error_code: str) -> Callable[[Any], Any]:
    """As the hub does for gated models: their lists of files are public."""

    def refuse(request: Any) -> Any:
        if "/resolve/" in request.url.path:
            return http.Response(code, headers={"X-Error-Code": error_code}, request=request)
        return None

    return refuse


def no_network(request: Any) -> Any:
    raise http.ConnectError("Name or service not known", request=request)


@pytest.mark.parametrize(
    ("source", "revision", "refuse", "message"),
    [
        (
            ID,
            None,
            refuse_files(401, "GatedRepo"),
            rf"^{ID} is gated: accept its licence at https://huggingface.co/{ID}, then log in with `hf auth login`",
        ),
        (ID, None, refuse_files(403, "GatedRepo"), rf"^{ID} is gated"),
        ("owner/other", None, None, r"^the hub has no model owner/other that you may see: .* log in with"),
        (ID, "v9", None, rf"^{ID} has no revision v9: https://huggingface.co/{ID}/commits lists them$"),
        (ID, None, no_network, rf"^cannot fetch {ID}: the hub cannot be reached, .*Name or service not known\)$"),
        (ID, None, lambda request: http.Response(500, request=request), rf"^cannot fetch {ID}: .*500"),
    ],
)
def test_what_the_hub_refuses(fake, tmp_path, monkeypatch, source, revision, refuse, message):
    if refuse is not None:
        fake.refuse = refuse
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    with pytest.raises(UserError, match=message) as caught:
        conversion.convert_model(source, tmp_path / "out", revision=revision)
    assert "\n" not in str(caught.value)
    # No user can correct a hub that does not answer: launchers then start the command again
    assert exit_code(caught.value) == (1 if message.startswith("^cannot fetch") else 2)
    assert not (tmp_path / "out").exists()


def test_what_was_fetched_before_needs_no_network(fake, tmp_path):
    conversion.convert_model(ID, tmp_path / "first")
    fake.refuse = no_network
    conversion.convert_model(ID, tmp_path / "second")
    fingerprints = {ModelDirectory.open(tmp_path / name).fingerprint for name in ("first", "second")}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        (ID, True),
        ("black-forest-labs/FLUX.1-dev", True),
        ("flux", False),
        ("a/b/c", False),
        ("/absolute", False),
        ("./models", False),
        ("../flux", False),
        ("owner/", False),
    ],
)
def test_what_is_a_hub_id(source, is_id):
    assert hub.is_repository(source) == is_id


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (ID, (ID, "")),
        ("owner/name/2steps", ("owner/name", "2steps")),
        ("owner/name/a/b.c", ("owner/name", "a/b.c")),
        ("owner", None),
        ("owner/name/", None),
        ("owner/name/../up", None),
        ("/owner/name/folder", None),
    ],
)
def test_what_is_a_hub_id_with_a_folder(source, parts):
    assert hub.split_folder(source) == parts


def test_a_folder_has_no_revision(folder, tmp_path):
    with pytest.raises(UserError, match="is a folder, and only a model on the hub has a revision"):
        conversion.convert_model(folder, tmp_path / "out", revision="v1")


def test_a_path_beside_existing_folders_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_repository("runs/flux")
    (tmp_path / "runs").mkdir()
    assert not hub.is_repository("runs/flux")
    assert hub.split_folder("runs/flux/2steps") is None
    assert hub.is_repository("hf:runs/flux")
    assert hub.split_folder("hf:runs/flux/2steps") == ("runs/flux", "2steps")
    assert not hub.is_repository("hf:runs")


def test_a_missing_local_path_is_not_looked_up(fake, folder, tmp_path, monkeypatch):
    """As model, adapter and prompts, beside a folder `owner`; the hub has models under that name."""

    def offline(request: Any) -> Any:
        raise AssertionError(f"asked the hub for {request.url}")

    model = ModelDirectory.open(conversion.convert_model(folder, tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    fake.refuse = offline
    message = rf"{ID} does not exist; it is taken for a local path because owner exists \(.* would be hf:{ID}\)"
    with pytest.raises(UserError, match=f"^source folder {message}"):
        conversion.convert_model(ID, tmp_path / "out")
    with pytest.raises(UserError, match=f"^adapter {message}"):
        student_formats.open_student(ID, model)
    with pytest.raises(UserError, match=f"^cannot read prompts: {message}"):
        read_prompts(f"{ID}:train")


def test_prefix_of_the_hub(fake, folder, tmp_path, monkeypatch):
    fake.folder = shutil.copytree(folder, tmp_path / "repository")
    (fake.folder / "2steps").mkdir()
    (fake.folder / "2steps" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    model = ModelDirectory.open(conversion.convert_model(f"hf:{ID}", tmp_path / "model"))
    assert model.family.pipeline == "FluxPipeline"
    assert "transformer/config.json" in fake.fetched
    fetched = student_formats.find(f"hf:{ID}/2steps")
    assert (fetched / "config.json").read_text() == "{}"
    with pytest.raises(UserError, match="the hub has no model owner/other that you may see"):
        student_formats.find("hf:owner/other")
