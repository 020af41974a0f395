"""Headers of safetensors files, and indexes of shards: any bytes give tensors that lie in the file, or an error."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from arcflow_jax.errors import UserError
from arcflow_jax.storage.files import write_json
from arcflow_jax.storage.safetensors import read_file, read_folder, read_header, read_metadata, write_tensors

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int8)}
WHOLE = save(ARRAYS)


def with_header(header: object, data: bytes = bytes(28)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list, first: int = 0, last: int = 24, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 100,
        (2**40).to_bytes(8, "little") + b"{}",
        with_header({"a": entry([2, 3], 0, 28)}),  # longer than its shape
        with_header({"a": entry([-2, -3])}, bytes(24)),
        with_header({"a": entry([2**63, 2])}, bytes(24)),
        with_header({"a": entry([6]), "b": entry([6])}, bytes(24)),  # one over the other
        with_header({"a": entry([6])}, bytes(28)),  # bytes of no tensor
        with_header({"a": entry([1.5])}, bytes(24)),
        with_header({"a": entry([6], dtype="F4096")}, bytes(24)),
        with_header({"a": 3}),
        with_header([1]),
        b"\x10\x27\0\0\0\0\0\0" + b'{"a":' * 2000,
        WHOLE[:-1],
    ],
)
def test_a_damaged_file_is_told(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255), length=st.integers(0, len(WHOLE)))
@example(position=0, byte=WHOLE[0], length=len(WHOLE))
def test_any_bytes_are_tensors_of_the_file_or_an_error(tmp_path, position, byte, length):
    content = bytearray(WHOLE)
    content[position] = byte
    file = tmp_path / "x.safetensors"
    file.write_bytes(content[:length])
    try:
        tensors = read_header(file)
    except UserError:
        return
    for tensor in tensors.values():
        assert 0 <= tensor.offset <= length
        assert np.asarray(tensor).shape == tensor.shape  # reads all of its bytes


def test_any_layout_in_memory_is_written(tmp_path):
    """The library itself writes the bytes of a view as they lie there, under its shape."""
    rows = ARRAYS["a"]
    tensors = {"transposed": rows.T, "every second": rows[:, ::2], "backwards": rows[::-1], "number": np.float32(3)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = read_header(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(found[name]), tensor, strict=True)


@pytest.mark.parametrize("value", [5, None, {"a": "b"}])
def test_metadata_that_is_no_text_is_damage(tmp_path, value):
    (tmp_path / "x.safetensors").write_bytes(with_header({"__metadata__": {"policy_config": value}}, b""))
    with pytest.raises(UserError, match=r"x\.safetensors: __metadata__\.policy_config is .*, but has to be a text"):
        read_metadata(tmp_path / "x.safetensors")


def test_a_name_in_an_error_has_no_control_codes(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(
        with_header({"\x1b[31m\na" * 100: entry([6], dtype="C64", last=48)}, bytes(48))
    )
    with pytest.raises(UserError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not a regular file"):
        read_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "a\n.safetensors", "", 3]
)
def test_an_index_names_files_of_its_own_folder(tmp_path, name):
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(ARRAYS, tmp_path / "outside.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": name, "b": name}})
    with pytest.raises(UserError, match=r"index\.json: weight_map"):
        read_folder(folder)
