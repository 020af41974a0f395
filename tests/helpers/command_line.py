"""The command line, run from the outside."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arcflow_jax.cli.app import main


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code or 0, *capfd.readouterr()


def assert_refused(capfd, folder: Path, *arguments: object, message: str) -> None:
    """Exit code 2, one line on stderr that matches, nothing new in `folder`."""
    before = sorted(folder.rglob("*"))
    code, _, stderr = run(capfd, *arguments)
    assert code == 2
    assert re.fullmatch(r"error: .*\n", stderr), stderr
    assert re.search(message, stderr), stderr
    assert sorted(folder.rglob("*")) == before
