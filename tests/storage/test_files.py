"""JSON, digests and config dataclasses."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, ClassVar

import pytest

from arcflow_jax import schema
from arcflow_jax.errors import UserError
from arcflow_jax.storage.files import file_digest, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Part:
    width: int
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part
    name: str
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    flag: bool = False
    most: int | None = None
    extra: dict[str, Any] | None = None

    REQUIRED: ClassVar[dict[str, Any]] = {"kind": "a"}


GIVEN = {"part": {"width": 3, "other": 1}, "name": "x"}


def test_config_is_filled():
    config = GIVEN | {"sizes": [1, 2], "pair": [1, 2.5], "flag": True, "most": None, "kind": "a", "other": [3]}
    expected = Whole(Part(3), "x", (1, 2), (1, 2.5), True)
    assert schema.parse(Whole, config, "here") == expected
    assert schema.parse(Whole, GIVEN | {"most": 4, "extra": {}}, "here") == Whole(Part(3), "x", most=4, extra={})
    assert schema.parse(Part, {"width": 1, "scale": 2}, "here").scale == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "here: missing name"),
        ({"part": {}}, "here, part: missing width"),
        ({"part": 3}, "here, part is 3, but has to be a JSON object"),
        ({"part": {"width": 3.5}}, "here, part: width is 3.5, but has to be a whole number"),
        ({"part": {"width": True}}, "here, part: width is True, but has to be a whole number"),
        ({"name": 3}, "here: name is 3, but has to be a text"),
        ({"sizes": [1, "2"]}, r"here: sizes is \[1, '2'\], but has to be a list, each a whole number"),
        ({"sizes": 3}, "here: sizes is 3, but has to be a list, each a whole number"),
        ({"pair": [1.0]}, r"here: pair is \[1.0\], but has to be a list of 2, each a number"),
        ({"flag": 1}, "here: flag is 1, but has to be true or false"),
        ({"most": "4"}, "here: most is '4', but has to be a whole number"),
        ({"extra": []}, r"here: extra is \[\], but has to be a JSON object"),
        ({"kind": "b"}, "here: kind is 'b', only 'a' is supported"),
    ],
)
def test_config_that_is_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        schema.parse(Whole, GIVEN | changes, "here")


def test_json_comes_back_and_an_error_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": [1, None]})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": [1, None]}
    assert list(tmp_path.iterdir()) == [file]


def test_file_digest(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()
