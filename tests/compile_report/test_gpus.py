"""Programs compiled for GPUs that are not attached."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from arcflow_jax.compile_report import report, topology
from arcflow_jax.compile_report.topology import CHIPS, chip, cuda_libraries, environment, gpus, target_config
from arcflow_jax.errors import UserError
from arcflow_jax.parallel.chips import chip_of

FLUX = str(Path(__file__).parents[2] / "configs" / "flux.py")


def parsed(text: str) -> dict:
    """A protocol buffer in text format as nested dicts, in a notation that JSON reads after three substitutions."""
    text = re.sub(r"(\w+) \{", r'"\1": {', text)
    text = re.sub(r"(\w+): (?=[\d\"])", r'"\1": ', text)
    return json.loads("{" + re.sub(r'(?<=[\d"}]) (?=")', ", ", text) + "}")


@pytest.mark.parametrize("name", topology.GPUS)
def test_target_config_states_the_chip(name):
    known = CHIPS[name]
    config = parsed(target_config(known))
    device = config["gpu_device_info"]
    assert device["name"] == config["device_description_str"] == known.kinds[0]
    assert tuple(device["cuda_compute_capability"].values()) == known.gpu.capability
    assert (device["core_count"], device["device_memory_size"]) == (known.gpu.cores, known.memory)
    assert device["shared_memory_per_block_optin"] < device["shared_memory_per_core"] == known.gpu.shared
    assert config["platform_name"] == "CUDA"


@pytest.mark.parametrize("name", topology.GPUS)
def test_records_agree_with_themselves(name):
    """The peak matrix rate is a power of two of multiply-adds a clock and core, within what data sheets round."""
    known = CHIPS[name]
    a_clock = known.flops / 2 / known.gpu.cores / known.gpu.clock / 1e9
    nearest = 2 ** round(math.log2(a_clock))
    assert a_clock == pytest.approx(nearest, rel=0.11)
    assert chip_of(known.kinds[0]) is known


def test_topologies_of_gpus():
    assert chip("h100") is chip("h100:8") is CHIPS["h100"]
    assert [gpus(name) for name in ("h100", "h100:1", "h100:8", "h100:64", "h100:12", "h100:0", "h100:x")] == [
        *(1, 1, 8, 64),
        *(0, 0, 0),
    ]
    for wrong in ("h100:12", "h100:0", "h100:", "h100:2x2", "h100:8*2", "v5p", "h900", "cpu:8"):
        with pytest.raises(UserError, match="unknown topology"):
            chip(wrong)


def test_slices_of_tpus():
    assert chip("v5p:2x2x1*2") is chip("v5p:2x2x1") is CHIPS["v5p"]
    for wrong in ("v5p:2x2x1*x", "v5p:2x2x1*0", "v5p:2x2x1*", "v5p:2x2x1*1*2", "v5p:*2"):
        with pytest.raises(UserError, match=r"unknown topology .* or v6e:2x4\*2 for two slices"):
            topology.describe(wrong)


def test_a_missing_or_other_compiler_names_the_command(monkeypatch):
    versions = {"jax-cuda12-plugin": "0.1.0", "jax-cuda12-pjrt": jax.__version__}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(topology.importlib.metadata, "version", version)
    command = re.escape(f"pip install 'jax[cuda12-local]=={jax.__version__}' nvidia-cudnn-cu12")
    with pytest.raises(UserError, match=f"jax-cuda12-plugin 0.1.0 is not of jax's version .*{command}"):
        environment(["h100"])
    versions["jax-cuda12-plugin"] = jax.__version__
    with pytest.raises(UserError, match=f"nvidia-cudnn-cu12, .* is not installed: {command}"):
        environment(["h100"])


def test_more_memory_than_there_is_is_out_of_memory():
    """XLA for GPUs compiles such a program; libtpu refuses it."""
    case = report.Case("sampler", FLUX, (), "rtx4090", (1, 1, 1, 1), 1)
    answer = {"status": "compiled", "devices": 1, "flops": 1, "passes": 1, "arguments": 1, "peak": 24 * 2**30}
    assert report.row(case, answer)["status"] == "out of memory"
    assert report.row(case, answer | {"peak": 23 * 2**30})["status"] == "compiled"


# As the child process does, and what the program's attention is
COMPILE = """
import json, sys
from arcflow_jax.compile_report.child import build, compile_program

case = json.load(sys.stdin)
mesh, program = build(**case)
print(json.dumps(compile_program(mesh, program)))
"""


def test_compiles_for_gpus(tiny_flux):
    """On two H100, with cuDNN's attention, whose products are counted."""
    try:
        cuda_libraries()
    except UserError as error:
        pytest.skip(str(error))
    sizes = ("--config.resolutions=((256, 256),)", f"--config.model={tiny_flux}", "--config.adapter.rank=8")
    case = report.Case("sampler", FLUX, sizes, "h100:2", (1, 2, 1, 1), 2)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(dataclasses.asdict(case)),
        env=environment(["h100"]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    row = report.row(case, json.loads(done.stdout.splitlines()[-1]))
    assert row["status"] == "compiled"
    assert row["devices"] == 2
    assert row["collectives"]["all-gather"]["bytes"] > 0
    assert row["peak"] >= row["arguments"] + row["temporaries"] > 0
