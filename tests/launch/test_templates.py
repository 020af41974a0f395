"""The launch templates: they parse, their commands exist, and the script for TPU slices survives a preemption."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from arcflow_jax.parallel.xla_presets import PRESETS
from arcflow_jax.training.recipe import read_config
from tests.helpers.commands import check_command, commands
from tests.helpers.paths import ROOT

LAUNCH = ROOT / "tools" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def calls(file: Path) -> Iterator[list[str]]:
    """The calls of arcflow in a template, with values in place of a shell's variables."""
    text = file.read_text()
    if file.name == "jobset.yaml":
        for job in yaml.safe_load(text)["spec"]["replicatedJobs"]:
            for container in job["template"]["spec"]["template"]["spec"]["containers"]:
                yield container["args"]
        return
    # The example in a script's comment has arguments that it passes on to `arcflow train`
    for example in re.findall(r"tools/launch/\w+\.sh( --(?:.*\\\n)*.*)", text):
        yield ["train", *example.replace("\\\n#", "").split()]
    text = yaml.safe_load(text)["run"] if file.suffix == ".yaml" else text
    text = text.replace('"$ARCFLOW"', "arcflow").replace("$PRESET$arguments", "v5p --config tiny")
    text = re.sub(r"\$\w+", "1", text.replace('"$@"', "--config tiny").replace("\\\n", " "))
    for line in text.splitlines():
        if re.search(r"\barcflow train\b", line) and not line.startswith("#"):
            yield from commands(line.partition(" || ")[0])


@pytest.mark.parametrize("file", [*SCRIPTS, LAUNCH / "jobset.yaml", LAUNCH / "sky.yaml"], ids=lambda file: file.name)
def test_commands_parse(file):
    found = list(calls(file))
    assert len(found) == (1 if file.suffix == ".yaml" else 2)
    for call in found:
        check_command(call)
        options = [part for text in call for part in ([text] if "--config." in text else text.split("=", 1))]
        read_config(options[options.index("--config") + 1], [text for text in options if "--config." in text])
        assert "--xla-preset" not in options or options[options.index("--xla-preset") + 1] in PRESETS


@pytest.mark.parametrize("file", [*SCRIPTS, *(ROOT / "tests" / "launch").glob("*.sh")], ids=lambda file: file.name)
def test_scripts_parse(file):
    subprocess.run(["bash", "-n", file], check=True)
    assert os.access(file, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", file], check=True)


def test_dockerfile():
    """Each instruction is one; what is copied is there; the extras of the examples exist."""
    text = re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    words = [line.split()[0] for line in text.splitlines() if line]
    assert words[0] == "FROM"
    assert set(words) <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "STOPSIGNAL", "ENTRYPOINT"}
    extras = re.findall(r"EXTRA=(\w+)", (LAUNCH / "Dockerfile").read_text())
    setup = (ROOT / "setup.py").read_text()
    assert len(extras) == 4
    assert all(f'"{extra}": [' in setup for extra in extras)
    assert (ROOT / re.search(r"--constraint (\S+)", text)[1]).exists()


def test_jobset_covers_its_topology():
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    hosts = chips // pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    assert f"--config.batch={chips}" in pod["containers"][0]["args"]


GCLOUD = """#!/bin/bash
# A cloud with one slice, which is preempted once during training
echo "$*" >> "$LOG"
case "$*" in
    *"queued-resources create"*) echo ACTIVE > "$STATE" ;;
    *"queued-resources describe"*) cat "$STATE" 2> /dev/null ;;
    *"queued-resources delete"*) rm "$STATE" ;;
    *"arcflow train"*)
        if [ ! -e "$STATE.once" ]; then
            touch "$STATE.once"
            echo SUSPENDED > "$STATE"
            exit 255
        fi
        exit "$ENDS_WITH" ;;
esac
"""


@pytest.mark.parametrize("ends_with", [0, 2])
def test_a_preempted_slice_is_asked_for_again(tmp_path, ends_with):
    fakes = {"gcloud": GCLOUD, "sleep": "#!/bin/sh\n", "pip": '#!/bin/sh\ntouch "$5/arcflow_jax-1.whl"\n'}
    for name, text in fakes.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "STATE": f"{tmp_path}/state",
    }
    environment |= {"NAME": "a", "ZONE": "z", "TYPE": "v5p-128", "RUNTIME": "r", "PRESET": "v5p"}
    environment |= {"ENDS_WITH": str(ends_with), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [LAUNCH / "tpu_pod.sh", "--config", "flux", "--config.prompts=my prompts.txt"], env=environment, cwd=ROOT
    )
    assert done.returncode == ends_with
    lines = log.read_text().splitlines()
    assert sum("queued-resources create a" in line and line.endswith("--spot") for line in lines) == 2
    trained = [line for line in lines if "arcflow train" in line]
    assert len(trained) == 2
    assert trained[0].endswith(r"train --xla-preset v5p --config flux --config.prompts=my\ prompts.txt")
    # A slice that is done is given back; one on which the user's error is to be corrected stays
    assert sum("queued-resources delete" in line for line in lines) == (2 if ends_with == 0 else 1)
