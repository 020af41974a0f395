"""The package as users install it: a wheel, in a virtual environment of its own, used outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def binaries(tmp_path_factory) -> Path:
    """Where the new environment has its programs. Dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    # From a copy of what git has, so that build/ of the checkout plays no part
    source = folder / "source"
    subprocess.run(["git", "-C", ROOT, "checkout-index", "--all", f"--prefix={source}/"], check=True)
    subprocess.run([*pip, "wheel", source, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    (site_packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    # Appended to the path, after the wheel's own packages; .pth files in it, an editable install's, are not followed
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies()) + "\n")
    subprocess.run([*pip, "--python", folder / "env" / "bin" / "python", "install", "--no-deps", wheel], check=True)
    return folder / "env" / "bin"


def dependencies() -> list[str]:
    """The folders of the installed packages, without the checkout, where an editable install has put it on the path."""
    folders = [sysconfig.get_paths()["purelib"], *sys.path]
    return list(dict.fromkeys(folder for folder in folders if folder.endswith("site-packages")))


def run(binaries: Path, folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [binaries / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import(binaries, tmp_path):
    program = """
import json, arcflow_jax
from pathlib import Path
folder = Path(arcflow_jax.__file__).parent
print(json.dumps([str(folder), arcflow_jax.__version__, (folder / "py.typed").is_file()]))
"""
    folder, version, typed = json.loads(run(binaries, tmp_path, "python", "-c", program))
    assert Path(folder).is_relative_to(binaries.parent)
    assert version in (ROOT / "setup.py").read_text()
    assert typed


def test_help(binaries, tmp_path):
    assert "compile-report" in run(binaries, tmp_path, "arcflow", "--help")
    assert "--prompt" in run(binaries, tmp_path, "arcflow", "sample", "--help")
    assert "--teacher" in run(binaries, tmp_path, "arcflow", "demo", "--help")


def test_train_by_the_name_of_a_recipe(binaries, tmp_path):
    program = "from arcflow_jax.demo import ASSETS; print(ASSETS)"
    assets = run(binaries, tmp_path, "python", "-c", program).strip()
    assert Path(assets).is_relative_to(binaries.parent)
    run(binaries, tmp_path, "arcflow", "convert", "--source", f"{assets}/tiny-flux", "--out", "model")
    options = ("--config.model=model", f"--config.prompts={assets}/shapes/prompts-train.txt", "--config.out=run")
    assert "tensor" in run(binaries, tmp_path, "arcflow", "train", "--config", "tiny", "--dry-run", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
