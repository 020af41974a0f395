"""Files and directories that appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.storage.atomic import (
    cannot_write,
    incomplete,
    make_directory,
    refuse_used,
    whole_directory,
    whole_file,
)
from tests.helpers.full_disk import disk_for_files_up_to


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_file_replaces_the_old_one_at_the_end(tmp_path):
    (tmp_path / "a").write_text("old")
    with whole_file(tmp_path / "a") as aside:
        aside.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert content(tmp_path) == {"a": "new"}


def test_an_error_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")

    def write() -> None:
        with cannot_write("the file"), whole_file(tmp_path / "a") as aside:
            aside.write_text("x" * 100)

    with disk_for_files_up_to(10), pytest.raises(UserError, match="cannot write the file: File too large"):
        write()
    assert content(tmp_path) == {"a": "old"}


def test_a_directory_appears_at_the_end(tmp_path):
    out = tmp_path / "parent" / "out"
    incomplete(out).mkdir(parents=True)
    (incomplete(out) / "left").write_text("by a killed run")
    with whole_directory(out, needed=3) as aside:
        (aside / "a").write_text("new")
        assert not out.exists()
    assert content(tmp_path) == {"parent/out/a": "new"}


def test_an_error_leaves_no_directory(tmp_path):
    def write(needed: int) -> None:
        with whole_directory(tmp_path / "out", needed) as aside:
            (aside / "a").write_text("new")
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        write(3)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"out: it needs 1000000000\.00 GB, but only \d+\.\d\d GB are free"):
        write(10**18)
    assert not list(tmp_path.iterdir())


def test_used_directories_are_refused(tmp_path):
    refuse_used(tmp_path / "new" / "out")
    refuse_used(tmp_path)  # empty
    (tmp_path / "file").write_text("")
    for used in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists already: name a directory that does not exist"):
            refuse_used(used)
    with pytest.raises(UserError, match="file is not a directory"):
        refuse_used(tmp_path / "file" / "out")
    with pytest.raises(UserError, match=r"cannot write .*/file/out: Not a directory"):
        make_directory(tmp_path / "file" / "out")
