"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arcflow_jax.errors import NetworkError, UserError
from arcflow_jax.storage.atomic import (
    append,
    cannot_write,
    make_directory,
    refuse_used,
    unfinished,
    whole_directory,
    write_file,
)
from arcflow_jax.storage.lock import one_writer
from tests.helpers.full_disk import disk_for_files_up_to


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_file_replaces_the_old_one_at_the_end(tmp_path):
    (tmp_path / "a").write_text("old")
    write_file(tmp_path / "a", b"new")
    assert content(tmp_path) == {"a": "new"}


def test_two_writers_of_a_file_share_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    replace, seen = os.replace, []

    def replace_after_another(aside: Path, path: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        seen.append((tmp_path / "a").read_text())
        write_file(path, b"other")
        seen.append((tmp_path / "a").read_text())
        replace(aside, path)

    monkeypatch.setattr(os, "replace", replace_after_another)
    write_file(tmp_path / "a", b"one")
    assert seen == ["old", "other"]
    assert content(tmp_path) == {"a": "one"}  # which ended last


def test_an_error_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")

    def write() -> None:
        with cannot_write("the file"):
            write_file(tmp_path / "a", b"x" * 100)

    with disk_for_files_up_to(10), pytest.raises(UserError, match="cannot write the file: File too large"):
        write()
    assert content(tmp_path) == {"a": "old"}


def test_a_directory_appears_at_the_end(tmp_path):
    out = tmp_path / "parent" / "out"
    with whole_directory(out, needed=3) as aside:
        (aside / "a").write_text("new")
        assert not out.exists()
    assert content(tmp_path) == {"parent/out/a": "new"}


def test_two_writers_never_share_what_is_unfinished(tmp_path):
    def write_twice() -> None:
        with whole_directory(tmp_path / "out", 0) as one:
            with whole_directory(tmp_path / "out", 0) as other:
                (other / "b").write_text("other")
            (one / "b").write_text("one")

    with pytest.raises(UserError, match=r"cannot write .*/out: Directory not empty"):
        write_twice()
    assert content(tmp_path) == {"out/b": "other"}


def test_what_killed_runs_left_is_removed_by_the_one_writer(tmp_path):
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "kept").write_text("")
    (tmp_path / ".out.0123456789abcdef.incomplete").mkdir()
    (tmp_path / ".out.0123456789abcdef.incomplete" / "left").write_text("by a killed run")
    (tmp_path / ".out.fedcba9876543210.tmp").write_text("by a killed run")
    # What only looks like it: another output's, the user's, a link
    (tmp_path / ".out.2.0123456789abcdef.tmp").write_text("another output's")
    (tmp_path / ".out.backup.tmp").write_text("the user's")
    (tmp_path / ".out.aaaaaaaaaaaaaaaa.incomplete").symlink_to(secret)
    before = sorted(tmp_path.iterdir())
    write_file(tmp_path / "out", b"")  # without the lock, they may be another's that still writes
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])
    (tmp_path / "out").unlink()
    with one_writer(tmp_path / "out"), whole_directory(tmp_path / "out", needed=0):
        pass
    names = {".out.2.0123456789abcdef.tmp", ".out.backup.tmp", ".out.aaaaaaaaaaaaaaaa.incomplete", "elsewhere", "out"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (secret / "kept").exists()


def test_links_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    for name in ("a", "log", "out", ".cache.incomplete"):
        (tmp_path / name).symlink_to(tmp_path / "secret")
    write_file(tmp_path / "a", b"new")  # replaced
    assert (tmp_path / "a").read_text() == "new"
    with pytest.raises(OSError, match="symbolic links"):
        append(tmp_path / "log")
    for out in (tmp_path / "out", tmp_path / "dangling"):
        if not out.is_symlink():
            out.symlink_to(tmp_path / "nowhere")
        with pytest.raises(UserError, match=rf"{out} is a link: name what it leads to"):
            refuse_used(out, "done.json")
        with pytest.raises(UserError, match="is a link"), one_writer(out):
            pass
    with pytest.raises(UserError, match=r"\.cache\.incomplete is a link, which an unfinished cache does not have"):
        unfinished(tmp_path / "cache")
    (tmp_path / ".cache.incomplete").unlink()
    unfinished(tmp_path / "cache").mkdir()
    (unfinished(tmp_path / "cache") / "shard").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="shard is a link"):
        unfinished(tmp_path / "cache")
    assert (tmp_path / "secret").read_text() == "secret"


def test_the_longest_name(tmp_path):
    longest = tmp_path / ("é" * 127)  # 254 bytes
    with one_writer(longest):
        write_file(longest, b"new")
    assert content(tmp_path) == {longest.name: "new"}


def test_a_file_gets_the_usual_mode(tmp_path):
    (tmp_path / "usual").write_text("")
    write_file(tmp_path / "a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


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
    refuse_used(tmp_path / "new" / "out", "done.json")
    refuse_used(tmp_path, "done.json")  # empty
    (tmp_path / "file").write_text("")
    for used in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists already: name a directory that does not exist"):
            refuse_used(used, "done.json")
    with pytest.raises(UserError, match="file is not a directory"):
        refuse_used(tmp_path / "file" / "out", "done.json")
    with pytest.raises(UserError, match=r"cannot write .*/file/out: Not a directory"):
        make_directory(tmp_path / "file" / "out")


def test_an_error_names_the_output(tmp_path):
    """Not the directory beside it, which is gone then."""
    with pytest.raises(UserError) as caught, whole_directory(tmp_path / "out", 0) as aside:
        raise UserError(f"cannot read {aside / 'a'}")
    assert str(caught.value) == f"cannot read {tmp_path / 'out' / 'a'}"


def test_a_network_that_does_not_answer_stays_that(tmp_path):
    """The command then exits with another code."""
    with pytest.raises(NetworkError, match="does not answer"), whole_directory(tmp_path / "out", 0):
        raise NetworkError("the bucket of the source does not answer")
