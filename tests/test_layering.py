"""Imports point downward only, from a room to rooms that stand before it in `ROOMS`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "arcflow_jax"

ROOMS = [
    *(
        "errors",
        "schema",
        "console",
        "flow",
        "storage",
        "arrays",
        "parallel",
        "data",
        "networks",
        "convert",
        "families",
    ),
    *("models", "checkpoints", "generate", "image_to_image", "references", "sampling_settings", "loras", "training"),
    *("loaded_model", "pipeline", "serve", "evaluate", "compile_report", "demo", "cli", "__main__"),
]


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, by full name; of a name in a package, both are listed."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            found |= {str(node.args[0].value)} if called in ("import_module", "library", "__import__") else set()
    return found


def test_imports_point_downward():
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imported_modules(path):
            package, _, rest = module.partition(".")
            other = rest.split(".")[0]
            if room != "__init__" and package == "arcflow_jax" and other in ROOMS:
                seen += 1
                assert ROOMS.index(other) <= ROOMS.index(room), f"{path} imports {module}"
    assert seen > 50


# room in a room: what it may import of the outer one, besides itself
INNER = {
    "networks.backbones": "attention conditioning float16 head layers lora states transformer",
    "networks.text": "attention float16 layers states transformer",
    "networks.vaes": "attention float16 layers states",
    "convert.backbones": "rules",
    "convert.text": "rules",
    "convert.vaes": "rules",
    "training.report": "plan recipe state work",
    "evaluate.trajectory": "",
}


@pytest.mark.parametrize("room", INNER)
def test_rooms_in_a_room_keep_apart(room):
    outer, inner = room.split(".")
    allowed = {inner, *INNER[room].split()}
    files = sorted((PACKAGE / outer / inner).glob("*.py"))
    assert len(files) > 3
    for path in files:
        for module in imported_modules(path):
            if module.startswith(f"arcflow_jax.{outer}."):
                assert module.split(".")[2] in allowed, f"{path} imports {module}"


def test_torch_is_for_evaluation_networks_and_what_is_exported():
    exported = [PACKAGE / "checkpoints" / name for name in ("diffusers_pipeline.py", "comfyui_nodes.py")]
    for path in PACKAGE.rglob("*.py"):
        if {name.split(".")[0] for name in imported_modules(path)} & {"torch", "diffusers"}:
            assert path in (PACKAGE / "evaluate" / "features.py", *exported)
    # They run where this package is not, and nothing here imports them
    assert not any(name.startswith("arcflow_jax") for path in exported for name in imported_modules(path))
    imported = {name for path in PACKAGE.rglob("*.py") for name in imported_modules(path)}
    assert not any(path.stem in name for path in exported for name in imported)


def test_a_pipeline_loads_what_it_needs():
    script = """
import sys, arcflow_jax.models.model_directory
print('arcflow_jax.convert.engine' in sys.modules)
import arcflow_jax.pipeline
print({'fastapi', 'gradio', 'huggingface_hub.errors', 'tensorboardX', 'torch', 'transformers'} & sys.modules.keys())
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\nset()\n"
