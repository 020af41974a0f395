"""Students as folders for diffusers: the same latents in PyTorch, without this library, and back in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import ModelCard, constants
from PIL import Image

from arcflow_jax.checkpoints.diffusers_folder import export_diffusers
from arcflow_jax.checkpoints.student_formats import export_adapter, open_student
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.families import kontext
from arcflow_jax.flow.curve import Span
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.flow.legendre import Series
from arcflow_jax.flow.momentum import Mixture
from arcflow_jax.models.conversion import convert_model
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.student import AdapterConfig, split_model
from arcflow_jax.parallel.mesh import parse_mesh, sharded
from arcflow_jax.pipeline import ArcFlowPipeline
from tests.helpers.command_line import assert_refused, run
from tests.helpers.fake_hub import ID, http, serving
from tests.helpers.students import WEIGHTS, write_run
from tests.helpers.tiny_flux2 import make_tiny_flux2

for library in ("torch", "peft", "diffusers"):
    pytest.importorskip(library)

ALPHA = {"rank": 4, "alpha": 6.0, "dropout": 0.0}
STUDENTS = {
    "flux-momentum": AdapterConfig(modes=4, **ALPHA),
    "flux-legendre": AdapterConfig(modes=3, basis="legendre", **ALPHA),
    "flux-linear": AdapterConfig(modes=1, targets=(), **ALPHA),
    "qwen-momentum": AdapterConfig(modes=4, **ALPHA),
    "qwen-legendre": AdapterConfig(modes=3, basis="legendre", **ALPHA),
    "flux2-momentum": AdapterConfig(modes=4, **ALPHA),
    "flux2-legendre": AdapterConfig(modes=3, basis="legendre", **ALPHA),
    "kontext-momentum": AdapterConfig(modes=4, **ALPHA),
}
REFERENCES = {"flux2": 2, "kontext": 1}  # reference images of a call
RESOLUTIONS = [(48, 32), (32, 32), (32, 80)]  # smaller than those that FLUX.1-Kontext's are scaled to
SETTINGS = Distillation(nfe=3, shift=2.0, final_step_ratio=0.5)
PROMPTS = ["a red circle", "two small green squares on a black background"]
BAR = 1e-4  # in latents, which are of size 1

# Run by an interpreter that cannot import arcflow_jax or JAX
IN_PYTORCH = """
import sys
sys.modules |= dict.fromkeys(["arcflow_jax", "flax", "jax"])
import numpy, pathlib, torch
from diffusers import DiffusionPipeline
import diffusers.pipelines.flux.pipeline_flux_kontext as kontext
from PIL import Image
folder, *prompts = sys.argv[1:]
kontext.PREFERRED_KONTEXT_RESOLUTIONS = RESOLUTIONS
tokens = []  # the latents, packed, as one pipeline does not return them
for student in sorted(pathlib.Path(folder).glob("*-torch")):
    kind = student.name.split("-")[0]
    pipe = DiffusionPipeline.from_pretrained(
        f"{folder}/bases/{kind}", custom_pipeline=str(student), trust_remote_code=True
    )
    noise = torch.from_numpy(numpy.load(f"{folder}/noise.npy"))
    side = 4 * pipe.vae_scale_factor  # two tokens
    size = {"height": side, "width": side} | ({"max_area": side**2} if kind == "kontext" else {})
    settings = size | {"latents": noise.mT.reshape(2, 16, 2, 2) if kind == "flux2" else noise}
    settings["callback_on_step_end"] = lambda pipe, step, t, values: tokens.append(values["latents"]) or values
    images = pipe(prompts, output_type="latent", **settings).images
    assert kind == "flux2" or torch.equal(images, tokens[-1])
    numpy.save(student.with_suffix(".npy"), tokens[-1])
    if number := REFERENCES.get(kind):
        references = [Image.open(f"{folder}/{i}.png") for i in range(number)]
        image = references if number > 1 else references[0]
        pipe(prompts, image=image, output_type="latent", **settings)
        numpy.save(student.with_name(f"{student.name}-edited.npy"), tokens[-1])
    if student.name == "flux-momentum-torch":
        pipe(prompts, output_type="latent", num_inference_steps=2, guidance_scale=1.0, **settings)
        numpy.save(f"{folder}/two.npy", tokens[-1])
    image = pipe(prompts[0], **size, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (side, side)
    if kind == "flux2":
        try:
            pipe(prompts[0], guidance_scale=4.0)
        except ValueError as error:
            assert "leave out guidance_scale" in str(error), error
        else:
            raise AssertionError("a student was sampled with classifier-free guidance")
"""


@pytest.fixture(scope="module")
def runs(tiny_flux, tiny_qwen, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """For each of `STUDENTS` its base, and its run; beside the run is its folder for diffusers, RUN-torch."""
    folder, found = tmp_path_factory.mktemp("students"), {}
    (folder / "bases").mkdir()
    for kind in ("flux", "qwen"):
        (folder / "bases" / kind).symlink_to(ASSETS / f"tiny-{kind}")
    flux2 = convert_model(make_tiny_flux2(folder / "bases" / "flux2"), folder / "flux2")
    source = shutil.copytree(ASSETS / "tiny-flux", folder / "bases" / "kontext")
    index = json.loads((source / "model_index.json").read_text()) | {"_class_name": "FluxKontextPipeline"}
    (source / "model_index.json").write_text(json.dumps(index))
    bases = {"flux": tiny_flux, "qwen": tiny_qwen, "flux2": flux2, "kontext": convert_model(source, folder / "kontext")}
    for name, adapter in STUDENTS.items():
        base = bases[name.split("-")[0]]
        adapter = adapter.with_targets(ModelDirectory.open(base).family.lora_targets)
        write_run(folder / name, base, adapter, SETTINGS, guidance=2.0)
        export_diffusers(folder / name, folder / f"{name}-torch", dtype="float32")
        found[name] = (base, folder / name)
    return found


def references(number: int) -> list[Image.Image]:
    """Reference images, none of which has the size of another or needs no cropping."""
    small = np.random.default_rng(1).integers(0, 256, (number, 4, 8, 3), np.uint8)
    sizes = [(71 + 8 * i, 66) for i in range(number)]
    return [Image.fromarray(each).resize(size) for each, size in zip(small, sizes, strict=True)]


@pytest.fixture(scope="module")
def in_pytorch(runs) -> Path:
    """The folder of the latents that PyTorch makes from its noise.npy, [B, N, 4C]."""
    folder = next(iter(runs.values()))[1].parent
    np.save(folder / "noise.npy", np.random.default_rng(0).standard_normal((2, 4, 16)).astype(np.float32))
    for i, image in enumerate(references(max(REFERENCES.values()))):
        image.save(folder / f"{i}.png")
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    known = f"REFERENCES, RESOLUTIONS = {REFERENCES}, {RESOLUTIONS}\n"
    command = [sys.executable, "-I", "-c", known + IN_PYTORCH, folder, *PROMPTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_same_noise_same_latents(runs, in_pytorch, name, monkeypatch):
    monkeypatch.setattr(kontext, "RESOLUTIONS", RESOLUTIONS)
    base, path = runs[name]
    pipe = ArcFlowPipeline.from_pretrained(base, path, dtype="float32")
    side = 4 * ModelDirectory.open(base).config("vae").factor
    arguments = {"height": side, "width": side, "latents": np.load(in_pytorch / "noise.npy"), "output_type": "latent"}
    ours, theirs = pipe(PROMPTS, **arguments).images, np.load(in_pytorch / f"{name}-torch.npy")
    assert np.abs(ours - theirs).max() < BAR
    assert np.std(ours) > 0.3
    if number := REFERENCES.get(name.split("-")[0]):
        ours, edited = (
            pipe(PROMPTS, image=references(number), **arguments).images,
            np.load(in_pytorch / f"{name}-torch-edited.npy"),
        )
        assert np.abs(ours - edited).max() < BAR
        assert np.abs(edited - theirs).max() > 100 * BAR  # the references matter
    if name == "flux-momentum":  # with other settings than those of the distillation
        ours = pipe(PROMPTS, num_inference_steps=2, guidance_scale=1.0, **arguments).images
        two = np.load(in_pytorch / "two.npy")
        assert np.abs(ours - two).max() < BAR
        assert np.abs(two - theirs).max() > 100 * BAR


@pytest.mark.parametrize("modes", [1, 2, 5])
def test_closed_forms(modes):
    """Those of pipeline.py against ours, whatever the momenta."""
    import torch

    from arcflow_jax.checkpoints import diffusers_pipeline as theirs

    rng = np.random.default_rng(modes)
    means, logits, g = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, 3, modes, 5, 4), (2, 3, modes, 4), (2, 3, modes - 1, 4))
    )
    g *= rng.choice([0, 1e-6, 1, 20], g.shape).astype(np.float32)
    span = Span(jnp.float32(0.75), jnp.float32(0.25))
    outputs = torch.from_numpy(np.concatenate([x.reshape(2, 3, -1) for x in (means, logits, g)], axis=-1))
    expected = Mixture(*map(jnp.asarray, (means, logits, g))).mean_velocity(span, *span)
    np.testing.assert_allclose(theirs.momentum(outputs, modes, 0.5), expected, rtol=2e-5, atol=2e-5)

    expected = Series(jnp.asarray(means)).mean_velocity(span, *span)
    first = torch.from_numpy(means[:, :, 0].reshape(2, 3, -1))
    np.testing.assert_allclose(theirs.legendre(first, modes, 0.5), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_this_library_opens_the_folder(runs, name):
    base, path = runs[name]
    directory = ModelDirectory.open(base)
    (described, read), (expected, read_expected) = (open_student(where, directory) for where in (f"{path}-torch", path))
    kept = ("base", "distillation.nfe", "distillation.shift", "distillation.final_step_ratio", "guidance")
    kept += ("adapter.basis", "adapter.modes")
    for field in kept:
        values = [described, expected]
        for part in field.split("."):
            values = [getattr(value, part) for value in values]
        assert values[0] == values[1], field
    theirs, ours = (
        nnx.to_pure_dict(
            restore(sharded(parse_mesh(""), split_model(directory.student(each.adapter, jnp.float32))[2]), False)
        )
        for each, restore in ((described, read), (expected, read_expected))
    )
    scale = expected.adapter.alpha / expected.adapter.rank

    def same(path: jax.tree_util.KeyPath, a: jax.Array, b: jax.Array) -> None:
        is_b = path[-1].key == "b"  # LoRA's, into which the scale is multiplied
        np.testing.assert_allclose(a, b * scale if is_b else b, rtol=1e-6)

    jax.tree_util.tree_map_with_path(same, theirs, ours)


def test_the_authors_layout_is_in_it(runs, tmp_path):
    """One set of weights serves their loader, diffusers and this library."""
    _, path = runs["flux-momentum"]
    export_adapter(path, tmp_path / "theirs", dtype="float32")
    folder = Path(f"{path}-torch")
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    config, theirs = (json.loads((where / "config.json").read_text()) for where in (folder, tmp_path / "theirs"))
    assert {name: value for name, value in config.items() if name != "arcflow_jax"} == theirs
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", WEIGHTS, "pipeline.py"]


def test_what_the_authors_layout_cannot_hold(runs, capfd, tmp_path):
    _, path = runs["qwen-legendre"]
    config = json.loads((Path(f"{path}-torch") / "config.json").read_text())
    assert config["_class_name"] == "ArcFlowQwenImageTransformer2DModel"  # which their loader does not know
    refused = ("export", "--adapter", path, "--out", tmp_path / "out")
    assert_refused(capfd, path, *refused, message="of basis legendre: .* momentum; --format diffusers has room for it")


def test_a_folder_that_does_not_fit_is_refused(runs, tmp_path):
    base, path = runs["flux-legendre"]
    folder = shutil.copytree(f"{path}-torch", tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    record = config["arcflow_jax"]
    for changed, message in {
        "other base": (record | {"base": "0" * 64}, "was trained on base 000000000000…, this model is"),
        "modes": (record | {"modes": 4}, r"proj_out_coefficients.weight is \[48, 128\] instead of \[64, 128\]"),
        "curve": (record | {"curve": "spline"}, "arcflow_jax.*curve is 'spline'"),
        "no object": ([], "arcflow_jax is .*but has to be a JSON object"),
    }.values():
        (folder / "config.json").write_text(json.dumps(config | {"arcflow_jax": changed}))
        with pytest.raises(UserError, match=message):
            open_student(folder, ModelDirectory.open(base))
    with pytest.raises(UserError, match="a student of this base is of ArcQwenImageTransformer2DModel"):
        open_student(folder, ModelDirectory.open(runs["qwen-legendre"][0]))


def test_pushed_to_the_hub_and_used_from_there(runs, capfd, tmp_path, monkeypatch):
    import diffusers.utils.dynamic_modules_utils as modules
    from diffusers import DiffusionPipeline

    base, path = runs["flux-legendre"]
    report = {"images": {"count": 16}, "pfid": {"teacher": 12.25}, "clip": {"score": 0.31}, "notes": []}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "hub").mkdir()
    command = ("export", "--adapter", path, "--format", "diffusers", "--dtype", "float32", "--push", ID)
    options = ("--base-model", "someone/base", "--figures", tmp_path / "report.json")
    with serving(tmp_path / "hub", tmp_path / "cache", monkeypatch) as fake:
        code, stdout, _ = run(capfd, *command, *options, "--out", tmp_path / "out")
        assert (code, stdout) == (0, f"exported {path} to {tmp_path / 'out'} and to https://huggingface.co/{ID}\n")
        for file in (tmp_path / "out").iterdir():
            assert (tmp_path / "hub" / file.name).read_bytes() == file.read_bytes()

        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert (card.data.base_model, card.data.library_name) == ("someone/base", "diffusers")
        assert card.data.license_link == "https://huggingface.co/someone/base"
        for text in ("| curve | legendre, 3 coefficients |", "| pfid to the teacher images | 12.25 |", f'"{ID}"'):
            assert text in card.text

        directory = ModelDirectory.open(base)
        assert open_student(ID, directory)[0] == open_student(tmp_path / "out", directory)[0]
        monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        pipe = DiffusionPipeline.from_pretrained(ASSETS / "tiny-flux", custom_pipeline=ID, trust_remote_code=True)
        assert pipe.student["curve"] == "legendre"
        with pytest.raises(ValueError, match="own schedule and guidance: leave out negative_prompt"):
            pipe(PROMPTS[0], negative_prompt="blue")

        fake.refuse = lambda request: http.Response(403, request=request)
        code, stdout, stderr = run(capfd, *command, *options, "--out", tmp_path / "again")
        assert (code, stdout) == (2, "")
        assert f"again is complete, but not on the hub: the hub does not let you write to {ID}: log in" in stderr
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(tmp_path / "out"))


def test_a_base_model_on_the_hub(runs, tmp_path, monkeypatch):
    import diffusers.utils.dynamic_modules_utils as modules
    from diffusers import DiffusionPipeline

    _, path = runs["flux-momentum"]
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(ASSETS / "tiny-flux", tmp_path / "cache", monkeypatch):
        pipe = DiffusionPipeline.from_pretrained(
            ID, custom_pipeline=f"{path}-torch", trust_remote_code=True, cache_dir=tmp_path / "cache"
        )
    assert (pipe.student["curve"], pipe.transformer.proj_out.out_features) == ("momentum", 4 * 16 + 4 * 4 + 3 * 4)
    with pytest.raises(ValueError, match="a student of another base model: it needs a QwenImagePipeline"):
        pipe.load_student(f"{runs['qwen-momentum'][1]}-torch")


def test_refusals(runs, capfd, tmp_path):
    _, path = runs["flux-momentum"]
    (tmp_path / "report.json").write_text("{}")
    command = ("export", "--adapter", path, "--out", tmp_path / "out")
    for message, options in {
        "--push, --base-model: for --format diffusers and comfyui only": ("--push", ID, "--base-model", ID),
        "add --base-model OWNER/NAME": ("--format", "diffusers", "--push", ID),
        "a/b/c is no hub id of a model": ("--format", "diffusers", "--push", "a/b/c"),
        "base is no hub id of a model": ("--format", "diffusers", "--base-model", "base"),
        "has no figures: arcflow evaluate metrics": ("--format", "diffusers", "--figures", tmp_path / "report.json"),
    }.items():
        assert_refused(capfd, path, *command, *options, message=message)
    assert not (tmp_path / "out").exists()
