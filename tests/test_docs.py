"""The documents' links lead somewhere and their commands parse; documents and messages keep to the glossary."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import check_command, command_of, commands
from tests.helpers.paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = [path for room in ("arcflow_jax", "configs") for path in sorted((ROOT / room).rglob("*.py"))]

# The left-hand side of the glossary in CONTRIBUTING.md, and its relatives
OFFENDERS = re.compile(
    r"\b(pictures?|autoencoders?|true (classifier-free )?guidance|rescaled|network calls?|iterations?|raw time"
    r"|time (warp|shift)s?|goes on|going on|told to end|averaged (student|weights)|trunks?|geometr(y|ies)"
    r"|what it takes)\b",
    re.IGNORECASE,
)
# (file in the package, string): names on disk, which old files have
ALLOWED = {
    ("arrays/names.py", "trunk"),
    ("arrays/names.py", "Names on disk. The backbone is called `trunk` there, as in the first version of the"),
    ("evaluate/statistics.py", "pictures"),
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- links ---


def links(text: str) -> list[str]:
    """Targets of the links in a page, those of the web left out."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in links(page.read_text()):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(there), f"{there.name} has no heading {anchor}"


def test_every_page_is_listed():
    index = links((ROOT / "docs" / "index.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} == {
        target for target in index if "/" not in target and target.endswith(".md")
    }


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "arcflow_jax"
    rooms = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    rooms += [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    assert len(rooms) > 10
    assert [room for room in rooms if f"| `{room}` |" not in text] == []


# --- code ---


def test_imports_in_python_blocks_exist():
    blocks = [block for page in PAGES for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]
    imports = [x for block in blocks for x in ast.walk(ast.parse(block)) if isinstance(x, ast.ImportFrom)]
    ours = [(x.module, alias.name) for x in imports if x.module.startswith("arcflow_jax") for alias in x.names]
    assert len(ours) > 4
    for module, exported in ours:
        found = hasattr(importlib.import_module(module), exported) or importlib.util.find_spec(f"{module}.{exported}")
        assert found, f"{module} has no {exported}"


# --- commands ---


def code_lines(text: str) -> Iterator[str]:
    """The lines of a page's code blocks, fenced and indented, with continued lines joined."""
    fenced, block = False, []
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            block.append(line.strip())
    yield from "\n".join(block).replace("\\\n", " ").splitlines()


def in_code(page: Path) -> list[list[str]]:
    """The calls of arcflow in a page's code blocks."""
    # Only the shell's lines: a shell cannot split every line of Python
    lines = [line for line in code_lines(page.read_text()) if re.search(r"\barcflow [a-z]", line)]
    return [arguments for line in lines for arguments in commands(line)]


CALLS = [pytest.param(call, id=f"{name(page)}: {' '.join(call)}") for page in PAGES for call in in_code(page)]


@pytest.mark.parametrize("call", CALLS)
def test_commands_parse(call):
    check_command(call)


# The recipes that a page tells its reader to write
WRITTEN = {
    name: text
    for page in PAGES
    for name, text in re.findall(r"Write this to `(\w+\.py)`:\n\n```python\n(.*?)^```", page.read_text(), re.M | re.S)
}


@pytest.mark.parametrize("call", [call for call in CALLS if "--config" in call.values[0]])
def test_recipes_exist_with_their_keys(call, monkeypatch, tmp_path):
    from arcflow_jax.training.recipe import read_config

    monkeypatch.chdir(ROOT)
    recipe = call[call.index("--config") + 1]
    if recipe in WRITTEN:
        (tmp_path / recipe).write_text(WRITTEN[recipe])
        recipe = str(tmp_path / recipe)
    read_config(recipe, [text for text in call if text.startswith("--config.")])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_the_text_exist(page):
    """Of commands in running text, which may be parts of one: the command and the names of its options."""
    prose = re.sub(r"^(```.*?^```|    .*?$)", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for text in re.findall(r"`arcflow ([a-z][^`]*)`", prose):
        words = text.split()
        if words == ["evaluate"]:  # the group itself
            continue
        command, rest = command_of(words)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            option = word.partition("=")[0]
            assert not word.startswith("--") or option in known or option.startswith("--config."), text


def test_commands_are_found():
    page = """text
    $ .venv/bin/arcflow sample --prompt "a b" \\
        --steps 2  # two
    ssh --command "cd x && arcflow train --config y"
"""
    found = [call for line in code_lines(page) for call in commands(line)]
    assert found == [["sample", "--prompt", "a b", "--steps", "2"], ["train", "--config", "y"]]
    assert len(CALLS) > 30


# --- words ---


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_documents_keep_to_the_glossary(page):
    # CHANGELOG.md names what was renamed
    lines = enumerate(page.read_text().splitlines(), 1)
    assert [f"{number}: {found[0]}" for number, line in lines if (found := OFFENDERS.search(line))] == []


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of all string literals of a module: messages, help, docstrings, and the parts of f-strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def allowed(path: Path, text: str) -> bool:
    """Whether a string is, or begins as, one of `ALLOWED`."""
    return any(name(path) == f"arcflow_jax/{file}" and text.startswith(start) for file, start in ALLOWED)


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_messages_keep_to_the_glossary(path):
    found = [(line, OFFENDERS.search(text)) for line, text in strings(path) if not allowed(path, text)]
    assert [f"{line}: {offender[0]}" for line, offender in found if offender] == []


def test_the_glossary_finds_offenders():
    for text in ("the run goes on", "two Pictures", "iteration 3"):
        assert OFFENDERS.search(text)
    assert not OFFENDERS.search("AutoencoderKL, save_picture, an image's VAE")
