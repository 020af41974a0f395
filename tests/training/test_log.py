"""log.jsonl of a run that resumes."""

from __future__ import annotations

import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.training.report.log import forget_after

LINES = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": null}', '{"step": 3, "loss": 0.25}']


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("\n".join(LINES) + "\n", 2),  # step 3 comes after the checkpoint
        (LINES[0], 1),  # whole, but for the line's end
        (LINES[0] + "\n" + LINES[1][:-1], 1),  # cut off
        ("", 0),
    ],
)
def test_what_is_kept(tmp_path, text, kept):
    (tmp_path / "log.jsonl").write_text(text)
    forget_after(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(line + "\n" for line in LINES[:kept])


def test_damage_before_the_last_line_is_told(tmp_path):
    (tmp_path / "log.jsonl").write_text("\n".join([LINES[0][:-1], LINES[1]]))
    with pytest.raises(UserError, match=r"log\.jsonl, line 1 is not valid JSON"):
        forget_after(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == "\n".join([LINES[0][:-1], LINES[1]])
