"""Imports point downward only: each module imports modules of lower levels, or of its own package."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "arcflow_jax"

# From the ground up. A name with a dot at its end is a subpackage.
LEVELS = [
    {"errors", "basis"},
    {"geometry", "schedule", "latents", "momentum", "legendre", "sharding", "data", "offload", "preemption", "trace"},
    {"layers", "attention", "distributed"},
    {"lora"},
    {"models."},
    {"arc_model", "convert.", "tokenizers", "images"},
    {"distill", "sampler", "components"},
    {"model_directory", "optim", "prompt_sources"},
    {"conversion", "prompts", "pictures", "train_state"},
    {"checkpoint"},
    {"config", "adapter_formats"},
    {"embeddings"},
    {"run_log", "pipeline"},
    {"preview"},
    {"train"},
    {"dry_run"},
    {"evaluate."},
    {"demo.", "compile_report."},
    {"cli_options"},
    {"cli_evaluate"},
    {"cli", ""},
]


def level(module: str) -> int:
    """The level of a module named below arcflow_jax, e.g. "models.flux"."""
    for i, names in enumerate(LEVELS):
        if module in names or f"{module.split('.')[0]}." in names:
            return i
    raise AssertionError(f"arcflow_jax.{module} stands on no level: add it to LEVELS")


def imports(path: Path) -> set[str]:
    """The modules below arcflow_jax that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "arcflow_jax":
            base = node.module.removeprefix("arcflow_jax").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".strip(".")
                is_module = (PACKAGE / f"{name.replace('.', '/')}.py").exists() or (PACKAGE / name).is_dir()
                found.add(name if is_module else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("arcflow_jax.") for a in node.names if a.name.startswith("arcflow_jax.")}
    return found


def test_imports_point_downward():
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip(".")
        for imported in imports(path):
            seen += 1
            if imported.split(".")[0] == name.split(".")[0] and "." in imported + name:
                continue  # within a subpackage
            assert level(imported) < level(name), f"arcflow_jax.{name} imports arcflow_jax.{imported}"
    assert seen > 50


def test_no_torch_in_the_library():
    """evaluate/features.py asks for it by name, when a figure is of a network that runs in it."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("torch", "diffusers") for name in names), path
