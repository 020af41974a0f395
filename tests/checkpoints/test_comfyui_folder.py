"""Students as custom nodes for ComfyUI: loaded as ComfyUI loads a folder, and the images of diffusers' pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from arcflow_jax.checkpoints.diffusers_folder import export_diffusers
from arcflow_jax.demo import ASSETS
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.student import AdapterConfig
from tests.helpers.command_line import run
from tests.helpers.students import WEIGHTS, write_run

ALPHA = {"rank": 4, "alpha": 6.0, "dropout": 0.0}
STUDENTS = {
    "flux": AdapterConfig(modes=4, **ALPHA),
    "qwen": AdapterConfig(modes=3, basis="legendre", **ALPHA),
}
SETTINGS = Distillation(nfe=3, shift=2.0, final_step_ratio=0.5)
FILES = ["README.md", "__init__.py", "config.json", WEIGHTS, "pipeline.py", "requirements.txt"]

# Run by an interpreter that has no arcflow_jax, no JAX, and of ComfyUI what its documents say that nodes may call
IN_COMFYUI = """
import sys
sys.modules |= dict.fromkeys(["arcflow_jax", "flax", "jax"])
import importlib.util, inspect, json, pathlib, types
import numpy, torch

bases, *folders = map(pathlib.Path, sys.argv[1:])
called, device = [], torch.device("cpu")

class Interrupted(Exception):
    pass

def interrupted():
    called.append("interrupted?")
    if called.count("interrupted?") == interrupt_at:
        raise Interrupted

class ProgressBar:
    def __init__(self, total):
        called.append(f"of {total}")
    def update(self, value):
        called.append(f"done {value}")

comfy = types.ModuleType("comfy")
comfy.model_management, comfy.utils = types.ModuleType("comfy.model_management"), types.ModuleType("comfy.utils")
comfy.model_management.get_torch_device = lambda: device
comfy.model_management.unload_all_models = lambda: called.append("unloaded")
comfy.model_management.throw_exception_if_processing_interrupted = interrupted
comfy.utils.ProgressBar = ProgressBar
sys.modules |= {module.__name__: module for module in (comfy, comfy.model_management, comfy.utils)}
interrupt_at = None

def load_custom_node(folder, name):
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def check(node):
    assert isinstance(node.CATEGORY, str)
    assert isinstance(node.RETURN_TYPES, tuple) and all(isinstance(kind, str) for kind in node.RETURN_TYPES)
    inputs = node.INPUT_TYPES()
    json.dumps(inputs, allow_nan=False)  # which is how a browser gets them
    assert set(inputs) <= {"required", "optional", "hidden"} and "required" in inputs
    arguments = inspect.signature(getattr(node, node.FUNCTION)).parameters
    for name, (kind, options) in inputs["required"].items():
        assert name in arguments
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], name
        elif kind in ("STRING", "BOOLEAN"):
            assert isinstance(options["default"], {"STRING": str, "BOOLEAN": bool}[kind])

def run(name, nodes, **given):  # as the executor does: defaults where a user types nothing
    node, values = nodes[name], {}
    for name, (kind, options) in node.INPUT_TYPES()["required"].items():
        values[name] = given[name] if name in given else kind[0] if isinstance(kind, list) else options["default"]
    with torch.inference_mode():
        outputs = getattr(node(), node.FUNCTION)(**values)
    assert len(outputs) == len(node.RETURN_TYPES)
    return outputs[0]

nodes = {}
names = str(folders[0]).replace(".", "_x_"), folders[1].name  # as ComfyUI makes them, now and before
for folder, name in zip(folders, names):
    module = load_custom_node(folder, name)
    assert not nodes.keys() & module.NODE_CLASS_MAPPINGS.keys()
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    nodes |= module.NODE_CLASS_MAPPINGS
assert "diffusers" not in sys.modules and not set(map(str, folders)) & set(sys.path)
for node in nodes.values():
    check(node)
load, sample = ({folder: f"ArcFlow {what} {folder.name}" for folder in folders} for what in ("load", "sample"))
flux, qwen = folders
assert nodes[load[flux]].RETURN_TYPES[0] == nodes[sample[flux]].INPUT_TYPES()["required"]["student"][0]
assert nodes[load[flux]].RETURN_TYPES != nodes[load[qwen]].RETURN_TYPES
assert nodes[load[flux]].INPUT_TYPES()["required"]["base_model"][1]["default"] == "someone/base"
defaults = [{name: options.get("default") for name, (_, options) in nodes[node].INPUT_TYPES()["required"].items()}
            for node in sample.values()]
assert defaults[0]["steps"] == 3 and defaults[0]["guidance"] == 2.0 and "guidance" not in defaults[1]

from diffusers import DiffusionPipeline
settings = dict(prompt="a red circle", seed=2**63 + 5, width=64, height=32, batch_size=2)
for folder, base in ((flux, bases / "tiny-flux"), (qwen, bases / "tiny-qwen")):
    called.clear()
    student = run(load[folder], nodes, base_model=f" {base}", precision="float32")
    images = run(sample[folder], nodes, student=student, **settings)
    assert called == ["unloaded", "of 3", *3 * ["interrupted?", "done 1"]], called
    assert images.shape == (2, 32, 64, 3) and images.dtype == torch.float32
    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=str(folder), trust_remote_code=True)

    def by_diffusers(**settings):
        noise, size = torch.Generator().manual_seed(2**63 + 5), {"width": 64, "height": 32}
        settings |= size | {"generator": noise, "num_images_per_prompt": 2, "output_type": "np"}
        return pipe("a red circle", **settings).images

    expected = by_diffusers()
    numpy.testing.assert_allclose(images, expected, atol=1e-5)
    assert 0 <= images.min() and images.max() <= 1 and images.std() > 0.01
    assert (run(sample[folder], nodes, student=student, **settings | {"seed": 1}) - images).abs().max() > 0.01
    if folder == flux:
        other = run(sample[folder], nodes, student=student, steps=2, guidance=1.0, **settings)
        expected = by_diffusers(num_inference_steps=2, guidance_scale=1.0)
        numpy.testing.assert_allclose(other, expected, atol=1e-5)
        assert (other - images).abs().max() > 0.01

called.clear()
interrupt_at = 2
try:
    run(sample[qwen], nodes, student=student, **settings)
except Interrupted:
    assert called.count("done 1") == 1
else:
    raise AssertionError("it ran on")

# On a GPU, which is not there: what goes to it, and when
device, moved = torch.device("cuda"), []
DiffusionPipeline.to = lambda pipe, device: moved.append(device)
DiffusionPipeline.enable_model_cpu_offload = lambda pipe, device: moved.append(f"offloaded to {device}")
for offload in (True, False):
    student = run(load[qwen], nodes, base_model=str(bases / "tiny-qwen"), offload=offload)
    assert student.student["curve"] == "legendre" and student.transformer.dtype == torch.bfloat16
assert moved == ["offloaded to cuda", device], moved

try:
    run(load[qwen], nodes, base_model=" ")
except ValueError as error:
    assert "base_model is empty: name a hub id" in str(error), error
else:
    raise AssertionError("it loaded nothing")
"""


@pytest.fixture(scope="module")
def runs(tiny_flux, tiny_qwen, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    for (name, adapter), base in zip(STUDENTS.items(), (tiny_flux, tiny_qwen), strict=True):
        adapter = adapter.with_targets(ModelDirectory.open(base).family.lora_targets)
        write_run(folder / name, base, adapter, SETTINGS, guidance=2.0)
    return {name: folder / name for name in STUDENTS}


@pytest.mark.slow
def test_as_comfyui_loads_and_runs_it(runs, tmp_path):
    for library in ("torch", "peft", "diffusers"):
        pytest.importorskip(library)
    folders = [tmp_path / f"{name}-student.v1.5" for name in runs]
    for adapter, folder in zip(runs.values(), folders, strict=True):
        export_diffusers(adapter, folder, dtype="float32", base_model="someone/base", comfyui=True)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", IN_COMFYUI, ASSETS, *folders]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_the_folder_is_diffusers_and_three_more(runs, capfd, tmp_path):
    """The pipeline and the weights are the same; the card says how to install the nodes."""
    written = {}
    for layout in ("diffusers", "comfyui"):
        command = ("export", "--adapter", runs["flux"], "--format", layout, "--out", tmp_path / layout)
        assert run(capfd, *command)[:2] == (0, f"exported {runs['flux']} to {tmp_path / layout}\n")
        written[layout] = {file.name: file.read_bytes() for file in (tmp_path / layout).iterdir()}
    cards = {layout: files.pop("README.md").decode() for layout, files in written.items()}
    assert sorted(written["comfyui"]) == sorted({*FILES} - {"README.md"})
    assert written["diffusers"].items() <= written["comfyui"].items()
    section = cards["comfyui"].partition("## In ComfyUI\n")[2].partition("\n## ")[0]
    assert "checked against ComfyUI's contract, not run in ComfyUI" in section
    assert cards["diffusers"] == cards["comfyui"].replace(f"## In ComfyUI\n{section}\n", "")
    compile(written["comfyui"]["__init__.py"], "__init__.py", "exec")
