"""The site builds without a warning, and what its pages quote from the code is there."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import arcflow_jax
from tests.helpers.paths import ROOT

# Whose errors a user meets in the common paths. Each needs an entry on the page
COMMON = (
    *("cli/exchange.py", "cli/options.py", "cli/sample.py", "parallel/mesh.py", "parallel/processes.py"),
    *("parallel/together.py", "storage/hub.py", "storage/paths.py", "storage/atomic.py", "models/conversion.py"),
    *("models/kernels.py", "models/model_cache.py", "models/model_directory.py", "data/prompts.py"),
    *("training/recipe.py", "training/overrides.py", "training/start.py", "training/loop.py", "training/compile.py"),
    *("training/embeddings.py", "training/report/trace.py", "training/plan.py", "sampling_settings.py", "generate.py"),
    "references.py",
)


def template(node: ast.AST) -> str | None:
    """A string of the code, with … in place of what is filled in; None of what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "…" for part in node.values)
    return None


def nodes(path: Path) -> Iterator[ast.AST]:
    yield from ast.walk(ast.parse(path.read_text()))


def quoted() -> list[str]:
    """The messages that the page of errors explains."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    also = re.findall(r"^Also: (.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    return [
        *re.findall(r"^#### `(.*)`$", page, re.MULTILINE),
        *(x for text in also for x in re.findall("`(.*?)`", text)),
    ]


def test_quoted_messages_exist():
    texts = [text for path in (ROOT / "arcflow_jax").rglob("*.py") for node in nodes(path) if (text := template(node))]
    assert len(quoted()) > 100
    assert [message for message in quoted() if not any(message in text for text in texts)] == []


@pytest.mark.parametrize("module", COMMON)
def test_errors_of_the_common_paths_have_an_entry(module):
    raised = [node.args[0] for node in nodes(ROOT / "arcflow_jax" / module) if is_error(node)]
    texts = [text for node in raised if (text := template(node)) and re.search(r"\w", text)]
    stems = [message for message in quoted() if re.search(r"\w", message)]
    assert [text for text in texts if not any(stem in text for stem in stems)] == []


def is_error(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError"


def test_public_names_are_documented():
    page = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(page) == sorted(f"arcflow_jax.{module}.{name}" for name, module in arcflow_jax.MODULES.items())


@pytest.mark.slow
def test_site_builds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "cli.html").read_text()
    from arcflow_jax.cli.app import app

    assert [name for name in typer.main.get_command(app).commands if f"arcflow {name}" not in page] == []
    assert "<table>" in (tmp_path / "site" / "hardware.html").read_text()
    assert "num_inference_steps" in (tmp_path / "site" / "api.html").read_text()


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    """With two training steps: nothing is learned, all is shown."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("QUICKSTART_STEPS", "2")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert [cell for cell in notebook.cells if cell.get("outputs")] == []  # committed without outputs
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [name for cell in notebook.cells for output in cell.get("outputs", []) for name in output.get("data", {})]
    assert shown.count("image/png") == 3
    assert json.loads((tmp_path / "quickstart" / "student" / "config.json").read_text())["steps"] == 2
