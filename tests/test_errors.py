"""Messages of errors: one printable line, whatever the names that they quote."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcflow_jax.errors import LONGEST, UserError, first_few, one_line, report_errors

HOSTILE = "a\nb\x1b[31m\x07\u202e\ud800"


@given(st.text() | st.sampled_from([HOSTILE, HOSTILE * 1000]))
def test_a_message_is_one_printable_line(text):
    message = str(UserError(f"cannot read {text}"))
    assert message.isprintable()
    assert len(message) <= LONGEST + 1
    assert one_line(text).isprintable()
    assert len(one_line(text)) <= 200


def test_a_name_stays_readable():
    assert str(UserError("line\u00e9 [bold] is fine")) == "line\u00e9 [bold] is fine"
    assert one_line(HOSTILE) == r"a b\x1b[31m\x07\u202e\ud800"
    assert first_few(["x" * 300, "\x1b"]) == "x" * 200 + r", \x1b"


def test_the_command_line_prints_no_control_codes(capfd):
    with pytest.raises(SystemExit), report_errors():
        raise UserError(f"{HOSTILE} is missing")
    assert capfd.readouterr().err == "error: a b\\x1b[31m\\x07\\u202e\\ud800 is missing\n"
