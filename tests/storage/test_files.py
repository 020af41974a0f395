"""JSON within limits, and digests."""

from __future__ import annotations

import hashlib
import json
import os
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arcflow_jax.errors import UserError
from arcflow_jax.storage import files
from arcflow_jax.storage.files import (
    file_digest,
    is_inside,
    json_records,
    parse_json,
    read_json,
    read_lines,
    read_own,
    write_json,
    write_own,
)
from arcflow_jax.training.report.log import Line


def test_json_comes_back_and_an_error_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": [1, None]})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": [1, None]}
    assert list(tmp_path.iterdir()) == [file]


def test_a_byte_order_mark_and_duplicate_keys_are_accepted(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 2}')
    assert read_json(tmp_path / "a.json") == {"a": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not valid JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b'{"a": 1', "is not valid JSON"),
        (b'{"a": NaN}', "is not valid JSON"),
        (b'{"a": 1e999}', "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (rb'{"a": "\ud800"}', "is not valid JSON"),
        (rb'{"a": "\udc00\ud800"}', "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "has more than 64 objects inside one another"),
        (b'{"a": ' + b"[" * 10**6, "has more than 64 objects inside one another"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(UserError, match=f"^here {message}"):
        parse_json(text, "here")


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b'{"a":' * 300)
def test_any_bytes_are_a_value_or_an_error(data):
    try:
        value = parse_json(data, "here")
    except UserError:
        return
    assert json.loads(json.dumps(value)) == value


@given(st.dictionaries(st.text(), st.integers(-(2**63), 2**64) | st.text() | st.none() | st.lists(st.booleans())))
def test_what_is_written_is_read(value):
    assert parse_json(json.dumps(value).encode(), "here") == value


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    start = time.monotonic()
    for path, reason in {
        tmp_path / "pipe.json": "is not a regular file",
        tmp_path: "is not a regular file",
        "/dev/zero": "is not a regular file",
        tmp_path / "none.json": "is missing",
        tmp_path / ("x" * 300): "cannot read .*File name too long",
        tmp_path / "a\0b": "cannot read",
    }.items():
        with pytest.raises(UserError, match=reason):
            read_json(type(tmp_path)(path))
    assert time.monotonic() - start < 5
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json(tmp_path / "real.json", {})
    assert read_json(tmp_path / "link.json") == {}


def test_a_file_that_is_too_large_is_refused_unread(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(UserError, match="has 1099511627776 bytes, but at most 16777216 are read"):
        read_json(tmp_path / "large.json")


def test_lines_are_read_within_limits(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": "\xe2\x80\xa8"}\r\n')
    assert list(json_records(file)) == [(f"{file}, line 1", {"a": 1}), (f"{file}, line 3", {"a": "\u2028"})]
    monkeypatch.setattr(files, "LINE", 12)
    with pytest.raises(UserError, match="line 3 has more than 12 bytes"):
        list(read_lines(file))


def test_a_file_of_ours_has_its_format_and_version(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"format": "f", "version": 1, "step": 3})
    assert read_own(Line, file, "f", 1) == Line(3)
    write_own(file, Line(3), "f", 2)
    with pytest.raises(UserError, match=r"is not of f version 1, but of version 2$"):
        read_own(Line, file, "f", 1)
    assert read_own(Line, file, "f", 2) == Line(3)
    file.write_text(file.read_text().replace("3", "4", 1))
    with pytest.raises(UserError, match=r"a\.json is damaged, or was changed by hand: its sha256 is not that"):
        read_own(Line, file, "f", 2)
    with pytest.raises(UserError, match=r"is not of g version 1, but of 'f'$"):
        read_own(Line, file, "g", 1)


def test_paths_inside_a_folder():
    assert all(map(is_inside, ("a", "a/b.json", "a/..b")))
    assert not any(map(is_inside, ("", ".", "/a", "../a", "a/../../b", "a\nb", "a\x1b[31m")))


def test_file_digest(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()
