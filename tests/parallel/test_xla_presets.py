"""Presets of XLA flags: what the user set stays, and XLA knows every flag."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.parallel.xla_presets import PRESETS, variables
from tests.helpers.processes import start


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_user_set_stays(preset):
    variable, flags = PRESETS[preset]
    first, second = list(flags)[:2]
    given = f"--{first}=mine --xla_other=1 --no{second}"
    found = variables(preset, {variable: given})[variable]
    assert found.startswith(f"{given} --")
    assert found.count(f"{first}=") == 1
    assert f"--{second}=" not in found
    assert [f"--{name}={flags[name]}" for name in flags if name not in (first, second)] == found.split()[3:]
    assert variables(preset, {})[variable].split() == [f"--{name}={value}" for name, value in flags.items()]


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="no XLA preset is called 'v3': known are v5p, v6e, h100"):
        variables("v3", {})


def test_the_flags_are_set_before_jax_starts():
    """A process of `arcflow train` ends at a flag that XLA does not know, so it has read the preset."""
    script = """
        import sys
        from arcflow_jax.parallel import xla_presets
        assert "jax" not in sys.modules
        xla_presets.PRESETS["h100"][1]["xla_no_such_flag"] = "1"
        from arcflow_jax.cli.app import main
        main(["train", "--config", "tiny", "--dry-run", "--xla-preset", "h100"])
    """
    process = start(1, "-c", "\n".join(line.strip() for line in script.splitlines()))
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1" in stderr


def test_xla_knows_the_flags_for_gpus():
    """jaxlib for CPUs has the flags of all platforms, and ends the process at an unknown one."""
    flags = variables("h100", {})["XLA_FLAGS"]
    done = [sys.executable, "-c", "import jax; print(len(jax.devices()))"]
    assert subprocess.run(done, env=os.environ | {"XLA_FLAGS": flags}, check=True, capture_output=True).stdout == b"1\n"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("preset", "topology"), [("v5p", "v5p:2x2x1"), ("v6e", "v6e:2x2")])
def test_libtpu_knows_the_flags_for_tpus(preset, topology):
    script = f"""if True:
        from jax.experimental import topologies
        print(len(topologies.get_topology_desc(platform="tpu", topology_name="{topology}").devices))
    """
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | variables(preset, {})
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "4"
