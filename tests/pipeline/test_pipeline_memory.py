"""How much memory the pipeline takes, what happens when there is too little, and several devices."""

# B images, N tokens, C latent channels

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from arcflow_jax import generate, loaded_model
from arcflow_jax.arrays.orbax import Arrays
from arcflow_jax.compile_report.programs import open_model
from arcflow_jax.errors import UserError
from arcflow_jax.families import text
from arcflow_jax.generate import sampling_mesh
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.states import flatten
from arcflow_jax.networks.student import split_model
from arcflow_jax.parallel import offload
from arcflow_jax.parallel.mesh import parse_mesh, sharded
from arcflow_jax.pipeline import ArcFlowPipeline
from arcflow_jax.training.recipe import Recipe, read_config
from tests.helpers.pixels import assert_same_images
from tests.helpers.processes import with_devices
from tests.helpers.random_student import write_adapter

PROMPTS = ["a red circle", "a large green ring", "a blue square on the left"]
SIZE = {"height": 32, "width": 64}


@pytest.fixture(scope="module")
def student(tiny_flux, tmp_path_factory) -> Path:
    return write_adapter(tiny_flux, tmp_path_factory.mktemp("run") / "student", seed=0)


@pytest.fixture(scope="module")
def pipe(tiny_flux, student) -> ArcFlowPipeline:
    return ArcFlowPipeline.from_pretrained(tiny_flux, student)


def on_device() -> int:
    """Bytes of all arrays in the device's own memory."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays() if array.sharding.memory_kind == "device")


def size(state) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["pinned_host", "a backend has no such memory"])
def test_offload(pipe, tiny_flux, student, monkeypatch, host):
    monkeypatch.setattr(offload, "HOST", host)
    before = on_device()
    gc.freeze()  # so that the searches below are short
    lean = ArcFlowPipeline.from_pretrained(tiny_flux, student, offload=True)
    held = {"loaded": on_device() - before}

    def watch(function):
        def watched(*args, **kwargs):
            result = function(*args, **kwargs)
            name = function.__name__
            held[name] = max(on_device() - before, held.get(name, 0))
            return result

        return watched

    for name, what in (("apply_encoder", text), ("sample_student", loaded_model), ("decode_latents", loaded_model)):
        monkeypatch.setattr(what, name, watch(getattr(what, name)))
    images = lean(PROMPTS, seed=3, batch_size=2, **SIZE).images
    held["done"] = on_device() - before
    monkeypatch.undo()

    activations = 2**20
    assert held["loaded"] < activations
    assert held["apply_encoder"] < size(lean.prompt_encoder.weights.state) + activations
    assert held["sample_student"] < size(lean.transformer.state) + activations
    assert held["decode_latents"] < size(lean.vae.state) + activations
    assert held["done"] < activations
    assert size(lean.transformer.state) > 5 * activations
    assert_same_images(images, pipe(PROMPTS, seed=3, batch_size=2, **SIZE).images, levels=0)
    assert_same_images(
        images, lean(PROMPTS, seed=3, batch_size=2, **SIZE).images, levels=0
    )  # nothing was lost on the way


def test_a_decoder_alone_is_loaded(pipe, tiny_flux):
    directory = ModelDirectory.open(tiny_flux)
    whole = nnx.state(directory.abstract("vae", jnp.float32))
    assert [path for path in flatten(whole) if path.startswith("decoder.")] == list(flatten(pipe.vae.state))
    assert size(pipe.vae.state) < 0.7 * sum(leaf.size * 4 for leaf in jax.tree.leaves(whole))


def test_merging_takes_the_memory_of_a_few_layers():
    """FLUX.1-dev's, compiled only. In float32, because XLA for CPUs copies a bfloat16 array that it should change."""
    root = Path(__file__).parents[2]
    config = read_config(str(root / "configs" / "flux.py"), [f"--config.model={root / 'configs' / 'flux.1-dev'}"])
    recipe = Recipe.from_config(config)
    directory, mesh = open_model(recipe.model), parse_mesh("")
    graphdef, base, trained = split_model(directory.student(recipe.adapter, jnp.float32))
    arguments = (graphdef, sharded(mesh, base), sharded(mesh, trained), mesh)
    memory = generate.merge_student.lower(*arguments).compile().memory_analysis()
    layer = 4 * 5 * 3072 * 3072  # bytes of the largest kernel's
    assert memory.temp_size_in_bytes < 4 * layer  # that kernel has 38, and all have 600
    assert memory.alias_size_in_bytes > 4 * 11.9e9


def out_of_memory(*args, **kwargs):
    """XLA's error on a full device."""
    return jax.block_until_ready(jnp.zeros(2**50, jnp.uint8))


@pytest.mark.parametrize("stage", ["apply_encoder", "sample_student", "decode_latents"])
def test_out_of_memory_while_sampling(pipe, monkeypatch, stage):
    monkeypatch.setattr(text if stage == "apply_encoder" else loaded_model, stage, out_of_memory)
    with pytest.raises(
        UserError, match=r"^out of memory, try smaller .*, more devices \(mesh\), offload: .*"
    ) as caught:
        pipe(PROMPTS[0], **SIZE)
    assert "\n" not in str(caught.value)


def test_out_of_memory_while_loading(tiny_flux, student, monkeypatch):
    monkeypatch.setattr(Arrays, "deserialize", out_of_memory)
    with pytest.raises(UserError, match=r"^out of memory, try smaller .*, more devices \(mesh\): RESOURCE"):
        ArcFlowPipeline.from_pretrained(tiny_flux, student, offload=True)


# Several devices


@pytest.mark.slow
def test_eight_devices_make_the_same_images(pipe, tiny_flux, student, tmp_path):
    """In a process that has eight CPU devices; each device holds only its part of the weights."""
    expected = pipe(PROMPTS[:2], batch_size=2, seed=3, **SIZE).images
    rows, columns = pipe.grid(**SIZE)
    conditioning = pipe.encode(PROMPTS[:2], guidance=2.0, rows=rows, columns=columns)
    tokens = pipe.denoise(pipe.noise(3, 2, rows, columns), conditioning, 2)
    script = f"""
import json, jax, numpy as np
from arcflow_jax.pipeline import ArcFlowPipeline
model, student, out = {str(tiny_flux)!r}, {str(student)!r}, {str(tmp_path)!r}

def held():
    bytes = [0] * 8
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            bytes[shard.device.id] += shard.data.nbytes
    return bytes

from jax.sharding import Mesh
from arcflow_jax.errors import UserError
from arcflow_jax.generate import sampling_mesh
eight = np.array(jax.devices())
own = sampling_mesh(Mesh(eight.reshape(4, 2), ("tensor", "fsdp")))
assert dict(own.shape) == {{"data": 1, "fsdp": 2, "tensor": 4, "sequence": 1}}
assert own.devices[0, 1, 2, 0] == eight.reshape(4, 2)[2, 1]
try:
    sampling_mesh(Mesh(eight.reshape(4, 2), ("model", "fsdp")))
except UserError as error:
    assert str(error).startswith("the mesh has axes model, fsdp: model is none of data, fsdp, tensor, sequence"), error
else:
    assert False

jax.set_mesh(jax.make_mesh((2, 4), ("x", "y")))  # the caller's, which the pipeline leaves alone
report = {{}}
for mesh in ("tensor=2,sequence=-1", "data=2,fsdp=2,tensor=2"):
    pipe = ArcFlowPipeline.from_pretrained(model, student, mesh=mesh)
    report[mesh] = {{"held": held()}}
    if mesh == "tensor=2,sequence=-1":
        conditioning = pipe.encode({PROMPTS[:2]!r}, guidance=2.0, rows=2, columns=4)
        tokens = pipe.denoise(pipe.noise(3, 2, 2, 4), conditioning, 2)
        report[mesh]["part"] = tokens.sharding.shard_shape(tokens.shape)
        np.save(out + "/tokens.npy", tokens)
        np.save(out + "/pixels.npy", pipe.decode(tokens, 2, 4))
    else:
        images = pipe({PROMPTS[:2]!r}, seed=3, height=32, width=64, batch_size=4).images
        np.save(out + "/" + mesh + ".npy", np.stack(images))
    del pipe
print(json.dumps(report))
"""
    environment = os.environ | with_devices(8)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])

    assert np.abs(np.load(tmp_path / "tokens.npy") - tokens).max() < 1e-5 * np.abs(tokens).max()
    assert_same_images(np.load(tmp_path / "pixels.npy"), expected)
    assert_same_images(np.load(tmp_path / "data=2,fsdp=2,tensor=2.npy"), expected)
    assert report["tensor=2,sequence=-1"]["part"] == [2, 2, 16]  # a fourth of the 8 image tokens

    # The decoder is whole everywhere; of the rest what `tensor` and `fsdp` divide between them
    decoder = size(pipe.vae.state)
    rest = size(pipe.transformer.state) + size(pipe.prompt_encoder.weights.state)
    for mesh, parts in {
        "tensor=2,sequence=-1": 2,
        "data=2,fsdp=2,tensor=2": 4,
    }.items():
        for held in report[mesh]["held"]:
            assert rest / parts < held - decoder < 1.15 * rest / parts, mesh


# Meshes of the caller


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_runs_under_the_callers_mesh(pipe, tiny_flux, student, kind):
    expected = pipe(PROMPTS[:2], seed=3, **SIZE).images
    mesh = jax.make_mesh((1,), ("model",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        assert_same_images(pipe(PROMPTS[:2], seed=3, **SIZE).images, expected, levels=0)
        for _ in pipe.stream(PROMPTS[0], **SIZE):
            assert jax.sharding.get_abstract_mesh().axis_names == ("model",)  # the caller's own, between the images
        rows, columns = pipe.grid(**SIZE)
        conditioning = pipe.encode(PROMPTS[:2], guidance=2.0, rows=rows, columns=columns)
        tokens = pipe.denoise(pipe.noise(3, 2, rows, columns), conditioning, 2)
        assert_same_images(pipe.decode(tokens, rows, columns), expected)
        loaded = ArcFlowPipeline.from_pretrained(tiny_flux, student, mesh=mesh)
        noise = jnp.asarray(jax.random.normal(jax.random.key(0), (1, 8, 16)))
        assert_same_images(
            loaded(PROMPTS[0], latents=noise, **SIZE).images, pipe(PROMPTS[0], latents=noise, **SIZE).images, levels=0
        )


def test_meshes_of_the_caller():
    devices = np.array(jax.devices()[:1])
    for mesh in (Mesh(devices, ("x",)), Mesh(devices.reshape(1, 1), ("x", "data")), Mesh(devices, ("tensor",))):
        assert sampling_mesh(mesh) == parse_mesh("")
