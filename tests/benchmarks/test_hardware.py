"""The table of which hardware does what: the first way that fits, and no more compilations than that takes."""

from __future__ import annotations

import pytest

from arcflow_jax.parallel.chips import GIB
from benchmarks import hardware

# GiB of arguments, and of the peak, in bfloat16
SIZES = {"text-encoder": (9, 10), "sampler": (22, 23), "vae-decoder": (1, 3)}


@pytest.fixture
def compiled(monkeypatch) -> list[tuple]:
    """The program and format of each compilation, which takes no time here."""
    found = []

    def report(cases, limit, out):
        (case,) = cases
        found.append((case.program, case.quantize))
        arguments, peak = (size * GIB // (2 if case.quantize else 1) for size in SIZES[case.program])
        if case.topology == "v5e:1x1" and peak > 16 * GIB:
            return [{"status": "out of memory", "needed": peak}]
        return [{"status": "compiled", "arguments": arguments, "peak": peak}]

    monkeypatch.setattr(hardware, "report", report)
    return found


def cell(tmp_path, chip: str) -> str:
    needs = hardware.Needs(tmp_path / "needs.json", 1.0)
    *_, line = hardware.table(needs, ["FLUX.1-dev"], gpu=False, tpus={chip: hardware.TPUS[chip]})
    return line


def test_the_first_way_that_fits(compiled, tmp_path):
    row = "| one TPU v5p (95 GiB) | bfloat16: 34.0 GiB |"  # 9 + 22 + 1 of weights, and 2 more of the VAE
    assert cell(tmp_path, "v5p") == row
    assert compiled == [(name, None) for name in SIZES]
    assert cell(tmp_path, "v5p") == row
    assert len(compiled) == 3  # the figures are in the file
    # More than nine tenths of 32 GiB together, but not one by one
    assert cell(tmp_path, "v6e") == "| one TPU v6e (32 GiB) | bfloat16, `--offload networks`: 23.0 GiB |"


def test_a_program_that_is_too_large(compiled, tmp_path):
    assert cell(tmp_path, "v5e") == "| one TPU v5e (16 GiB) | int8, `--offload networks`: 11.5 GiB |"
    assert compiled == [*((name, None) for name in SIZES), ("text-encoder", "int8"), ("sampler", "int8")]


def test_a_compiler_that_fails_says_nothing_of_the_hardware(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "report", lambda *_: [{"status": "failed", "detail": "no compiler"}])
    with pytest.raises(SystemExit, match="v5p:1x1x1, text-encoder, None, None: no compiler"):
        cell(tmp_path, "v5p")
    assert not (tmp_path / "needs.json").exists()
