"""Dataclasses from files, recipes and calls: types, ranges, and the errors that name what was wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from arcflow_jax import families, schema
from arcflow_jax.checkpoints.student_formats import HeadConfig, Sampling
from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.compile_report.report import Case
from arcflow_jax.data.embeddings import CacheDescription
from arcflow_jax.errors import UserError
from arcflow_jax.evaluate.trajectory.comparison import ComparisonSettings
from arcflow_jax.flow.schedule import Scheduler
from arcflow_jax.models.model_directory import ModelDescription
from arcflow_jax.sampling_settings import SamplingSettings
from arcflow_jax.training.recipe import Recipe
from arcflow_jax.training.report.log import Line

# Everything that is read from a file, or that a caller or the command line gives
READ = [
    *dict.fromkeys(network.config for family in families._FAMILIES.values() for network in family.networks.values()),
    *(Recipe, Scheduler, ModelDescription, AdapterDescription, CacheDescription, HeadConfig, Line),
    *(Sampling, SamplingSettings, ComparisonSettings, Case),
]


@dataclasses.dataclass(frozen=True)
class Part:
    width: schema.Width
    scale: schema.Scale = 1.0

    def __post_init__(self):
        if self.width == 13:
            raise UserError("width is 13, which is unlucky")


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part
    name: str
    sizes: tuple[Annotated[int, Meta(ge=1, le=9)], ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    flag: bool = False
    most: int | None = None
    extra: dict[str, Any] | None = None
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    kind: Literal["a", "b"] = dataclasses.field(default="a", metadata={"key": "class"})
    share: schema.Share = 0.5
    seed: schema.Seed = 0

    REQUIRED: ClassVar[dict[str, Any]] = {"built_in": "a"}


GIVEN = {"part": {"width": 3}, "name": "x"}


def test_a_dataclass_is_filled():
    config = GIVEN | {"sizes": [1, 2], "pair": [1, 2.5], "flag": True, "most": None, "class": "b", "other": [3]}
    expected = Whole(Part(3), "x", (1, 2), (1, 2.5), True, kind="b")
    assert schema.parse(Whole, config, "here") == expected
    assert schema.parse(Whole, GIVEN | {"most": 4, "extra": {}}, "here") == Whole(Part(3), "x", most=4, extra={})
    assert schema.parse(Whole, GIVEN | {"parts": {"one": {"width": 1}}}, "here").parts == {"one": Part(1)}
    assert schema.parse(Whole, GIVEN | {"seed": 2**64 - 1}, "here").seed == 2**64 - 1
    assert schema.parse(Whole, schema.unparse(expected), "here", own=True) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "missing name"),
        ({"part": {}}, "missing part.width"),
        ({"part": 3}, "part is 3, but has to be a JSON object"),
        ({"part": {"width": 3.5}}, "part.width is 3.5, but has to be a whole number from 1 to 1048576"),
        ({"part": {"width": True}}, "part.width is True, but has to be a whole number from 1 to 1048576"),
        ({"part": {"width": 0}}, "part.width is 0, but has to be a whole number from 1 to 1048576"),
        ({"part": {"width": 10**12}}, "part.width is 1000000000000, but has to be a whole number from 1 to 1048576"),
        ({"part": {"width": 13}}, "part.width is 13, which is unlucky"),
        ({"parts": {"a\nb": {"width": 0}}}, r"parts.a b.width is 0, but has to be a whole number from 1 to 1048576"),
        ({"name": 3}, "name is 3, but has to be a text"),
        ({"sizes": [1, "2"]}, r"sizes is \[1, '2'\], but has to be a list, each a whole number from 1 to 9"),
        ({"sizes": 3}, "sizes is 3, but has to be a list, each a whole number from 1 to 9"),
        ({"pair": [1.0]}, r"pair is \[1.0\], but has to be a list of 2, each a number"),
        ({"flag": 1}, "flag is 1, but has to be true or false"),
        ({"most": "4"}, "most is '4', but has to be a whole number"),
        ({"extra": []}, r"extra is \[\], but has to be a JSON object"),
        ({"built_in": "b"}, "built_in is 'b', only 'a' is supported"),
        ({"class": "c"}, "class is 'c', but has to be 'a' or 'b'"),
        ({"share": 1.0}, "share is 1.0, but has to be a number at least 0 and below 1"),
        ({"share": math.nan}, "share is nan, but has to be a number at least 0 and below 1"),
        ({"share": 10**400}, r"share is 10+\.\.\.0+, but has to be a number at least 0 and below 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616, but has to be a whole number from 0 to 18446744073709551615"),
        ({"name": ["x" * 5000] * 5000}, r"name is \['xx.{190,200}, but has to be a text"),
    ],
)
def test_values_that_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^here: {message}$"):
        schema.parse(Whole, GIVEN | changes, "here")


def test_null_in_formats_of_ours():
    """Elsewhere it stands for an absent value."""
    assert schema.parse(Whole, GIVEN | {"flag": None, "most": None}, "here") == Whole(Part(3), "x")
    assert schema.parse(Whole, GIVEN | {"most": None}, "here", own=True) == Whole(Part(3), "x")
    with pytest.raises(UserError, match=r"^here: flag is None, but has to be true or false$"):
        schema.parse(Whole, GIVEN | {"flag": None}, "here", own=True)


def test_unknown_keys_are_refused_in_formats_of_ours():
    with pytest.raises(UserError, match=r"^here: unknown flagg: did you mean flag"):
        schema.parse(Whole, GIVEN | {"flagg": True}, "here", own=True)
    with pytest.raises(UserError, match=r"^here: unknown part\.height: known are width, scale"):
        schema.parse(Whole, GIVEN | {"part": {"width": 3, "height": 2}}, "here", own=True)


@pytest.mark.parametrize("cls", READ, ids=lambda cls: cls.__name__)
def test_every_number_that_is_read_has_limits(cls):
    """So NaN, infinity and absurd sizes are refused where they are read, whatever field is added."""
    for hint in (hint for each in schema.types_of(cls).values() for hint in schema.numbers(each)):
        bounds = schema.limits(hint)
        assert bounds.keys() & {"ge", "gt"}, f"{cls.__name__} has a number without a lower limit"
        assert bounds.keys() & {"le", "lt"}, f"{cls.__name__} has a number without an upper limit"


def test_the_walk_over_numbers_finds_them_all():
    found = [number for hint in schema.types_of(Whole).values() for number in schema.numbers(hint)]
    assert found.count(float) == 2  # pair
    assert found.count(int) == 1  # most
    assert found.count(schema.Width) == found.count(schema.Scale) == 2  # part, parts


@given(st.floats() | st.integers() | st.booleans() | st.text() | st.none() | st.lists(st.integers()))
def test_a_number_in_its_range_or_an_error(value):
    try:
        found = schema.converted(schema.Share, value, "share")
    except UserError:
        assert isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1
    else:
        assert found == value
        assert type(found) is float


def test_a_call_may_give_numbers_of_numpy():
    settings = ComparisonSettings(steps=np.int64(3), guidance=np.float32(1.5))
    assert (type(settings.steps), type(settings.guidance)) == (int, float)
    with pytest.raises(UserError, match=r"^guidance is nan, but has to be a number from 0 to 1000$"):
        ComparisonSettings(guidance=np.float32("nan"))
