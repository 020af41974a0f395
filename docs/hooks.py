"""What MkDocs does for the site beside rendering docs/: pages that are made from other files, links, badges.

The pages are written for GitHub, where links are paths in the repository. On the site, the documents of the root folder
lie beside those of docs/.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from arcflow_jax.cli.app import app

ROOT = Path(__file__).parents[1]
AT_ROOT = ("BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "CITATION.cff")
# Pages with another name on the site, by their paths in the repository. README.md would become index.html
RENAMED = {"README.md": "overview.md", "docs/quickstart.ipynb": "notebook.md"}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")
INCLUDE = re.compile(r"<!-- include (\S+)#(\S+) -->")
COMMANDS = "<!-- commands -->"
BADGES = {"validated": "validated", "compiled only": "compiled", "not run": "unrun"}  # text: class in site.css


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents of the root folder, and the notebook as a page."""
    for name in AT_ROOT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, RENAMED["README.md"], content=(ROOT / "README.md").read_text(encoding="utf-8")))
    files.append(File.generated(config, "notebook.md", content=notebook()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """A page as the site shows it."""
    source = ROOT if page.file.src_uri in (*AT_ROOT, RENAMED["README.md"]) else ROOT / "docs"
    markdown = with_links(markdown, source)
    markdown = INCLUDE.sub(lambda found: section(source / found[1], found[2]), markdown)
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    for text, kind in BADGES.items():
        markdown = markdown.replace(f"`{text}`", f'<span class="badge {kind}">{text}</span>')
    return markdown


def with_links(markdown: str, folder: Path) -> str:
    """Links of a document in `folder` of the repository, as the site has them: all pages in one folder."""

    def target(found: re.Match[str]) -> str:
        path = (folder / found[2]).resolve().relative_to(ROOT).as_posix()
        return found[1] + RENAMED.get(path, path.removeprefix("docs/"))

    return LINK.sub(target, markdown)


def section(document: Path, anchor: str) -> str:
    """A section of a document, without its heading."""
    parts = re.split(r"^## (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = {heading.lower().replace(" ", "-"): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}
    return with_links(sections[anchor], document.parent)


def commands() -> str:
    """All commands with their options, as Typer knows them."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="arcflow"), name="arcflow")
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)  # cut after some words; the headings name them all
    return re.sub(r"^# .*\n", "", text).replace("```console\n$ ", "```text\n")


def notebook() -> str:
    """The notebook's cells as a page. Its file can be downloaded from there."""
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    shown = [
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, texts, strict=True)
    ]
    shown.insert(1, '<a href="quickstart.ipynb" download>Download this notebook</a>')
    return "\n\n".join(shown)
