"""Malformed requests: each is refused with an error in OpenAI's shape, which names the field."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.asking import GENERATIONS, asked, post
from tests.serve.conftest import LIMITS

BAD = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"prompt": "\xff"}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "NaN": b'{"prompt": "x", "guidance": NaN}',
    "deep": b"[" * 100_000,
    "a list": [],
    "a text": "prompt",
    "null": None,
    "no prompt": {},
    "null as prompt": {"prompt": None},
    "a number as prompt": {"prompt": 3},
    "an empty prompt": {"prompt": " \n"},
    "a long prompt": {"prompt": "x" * 201},
    "n": {"prompt": "x", "n": 0},
    "many": {"prompt": "x", "n": 5},
    "very many": {"prompt": "x", "n": 10**30},
    "half": {"prompt": "x", "n": 1.5},
    "true": {"prompt": "x", "n": True},
    "a negative seed": {"prompt": "x", "seed": -1},
    "a large seed": {"prompt": "x", "seed": 2**64},
    "size": {"prompt": "x", "size": "large"},
    "a size with zeros": {"prompt": "x", "size": "0x64"},
    "a size that is not served": {"prompt": "x", "size": "64x64"},
    "an odd size": {"prompt": "x", "size": "65x33"},
    "a huge size": {"prompt": "x", "size": "99999x99999"},
    "steps": {"prompt": "x", "steps": 5},
    "steps that are not served": {"prompt": "x", "steps": 3},
    "guidance": {"prompt": "x", "guidance": -1},
    "a negative prompt for a student": {"prompt": "x", "negative_prompt": "y"},
    "response_format": {"prompt": "x", "response_format": "path"},
    "output_format": {"prompt": "x", "output_format": "webp"},
    "quality": {"prompt": "x", "quality": "hd"},
    "stream": {"prompt": "x", "stream": True},
    "an unknown field": {"prompt": "x", "step": 2},
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_malformed_bodies(door, body):
    (answer,) = asked(door, post(body))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "secret-folder" not in answer.text
    assert len(answer.text) < 1500


def test_the_field_at_fault_is_named(door):
    answers = asked(door, *[post({"prompt": "x", **wrong}) for wrong in ({"n": 9}, {"size": "64x64"}, {"seed": "a"})])
    assert [answer.json()["error"]["param"] for answer in answers] == ["n", "size", "seed"]
    assert "64x32" in answers[1].text  # what would be right


def test_other_refusals(door):
    def request(method, path, **more):
        return httpx.Request(method, f"http://test{path}", **more)

    expected = {
        400: [request("POST", GENERATIONS, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})],
        413: [post({"prompt": "x" * LIMITS.body})],
        404: [
            post({"prompt": "x", "model": "dall-e-3"}),
            request("GET", GENERATIONS),
            request("GET", "/v1/models/dall-e-3"),
            request("DELETE", "/v1/models/student"),
            request("POST", "/v1/images/nothing"),
            request("GET", "/v1/images/files/../../../../etc/passwd.png"),
            request("GET", "/docs"),
            request("GET", "/openapi.json"),
            request("GET", "/etc/passwd"),
        ],
    }
    for status, requests in expected.items():
        answers = asked(door, *requests)
        assert {answer.status_code for answer in answers} == {status}
        assert all(answer.json()["error"]["message"] for answer in answers)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
# A size that no one serves: the test is of what is refused
BODIES = st.dictionaries(st.sampled_from(["n", "seed", "steps", "guidance", "model", "user", "stream"]), VALUES).map(
    lambda body: {"prompt": "x", "size": "16x16"} | body
)


@settings(max_examples=100, deadline=None)
@given(body=BODIES | VALUES | st.binary(max_size=50))
def test_any_body_is_refused_in_order(door, body):
    (answer,) = asked(door, post(body))
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["type"] == "invalid_request_error"
