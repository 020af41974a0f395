"""adapter.json, which describes a run's student: it comes back, and each damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcflow_jax.checkpoints.training import AdapterDescription
from arcflow_jax.errors import UserError
from arcflow_jax.flow.distill import Distillation
from arcflow_jax.models.model_directory import ComponentDescription
from arcflow_jax.networks.student import AdapterConfig
from tests.helpers.own_json import rewrite

DESCRIPTION = AdapterDescription(
    "0" * 64, AdapterConfig(3, 2, 2.0, 0.0, ("a.*",)), Distillation(), 2.5, ComponentDescription("Flux", {"layers": 2})
)


def edited(run: Path, edit: object) -> Path:
    """The run of `DESCRIPTION`, with its adapter.json changed by a function of its values."""
    DESCRIPTION.write(run)
    rewrite(run / "adapter.json", edit)
    return run


def test_adapter_json_comes_back(tmp_path):
    DESCRIPTION.write(tmp_path)
    read = AdapterDescription.read(tmp_path)
    assert read == DESCRIPTION
    assert read.transformer == DESCRIPTION.transformer  # which equality ignores
    without = AdapterDescription.read(edited(tmp_path, lambda values: values.pop("transformer")))
    assert (without, without.transformer) == (DESCRIPTION, None)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.pop("base"), "missing base$"),
        (lambda v: v.pop("adapter"), "missing adapter$"),
        (lambda v: (v.pop("distillation"), v.pop("guidance")), "missing distillation, guidance$"),
        (lambda v: v["adapter"].pop("rank"), r"missing adapter\.rank$"),
        (lambda v: v["distillation"].update(shift=None), r"missing distillation\.shift$"),
        (lambda v: v.update(base=5), "base is 5, but has to be a SHA-256, 64 hexadecimal digits$"),
        (lambda v: v.update(guidance="3.5"), "guidance is '3.5', but has to be a number from 0 to 1000$"),
        (lambda v: v.update(adapter=[1, 2]), r"adapter is \[1, 2\], but has to be a JSON object$"),
        (
            lambda v: v["adapter"].update(modes=2.5),
            r"adapter\.modes is 2\.5, but has to be a whole number from 1 to",
        ),
        (lambda v: v["adapter"].update(targets="a.*"), r"targets is 'a\.\*', but has to be a list, each a text$"),
        (lambda v: v["adapter"].update(modes=0), r"adapter\.modes is 0, but has to be a whole number from 1 to"),
        (
            lambda v: v["distillation"].update(nfe=True),
            r"distillation\.nfe is True, but has to be a whole number from 1 to",
        ),
        (lambda v: v["transformer"].pop("class"), r"missing transformer\.class$"),
        (lambda v: v["transformer"].update(config=3), r"transformer\.config is 3, but has to be a JSON object$"),
        (lambda v: v.update(version=9), "is not of arcflow_jax adapter version 1 or 2, but of version 9$"),
        (
            lambda v: v.update(seed=9),
            "unknown seed: known are base, .*, pipeline$",
        ),
        (
            lambda v: v["distillation"].update(shift=-1),
            r"distillation\.shift is -1, but has to be a number from",
        ),
        (lambda v: v["adapter"].update(rank=10**9), r"adapter\.rank is 1000000000, but has to be a whole number"),
    ],
)
def test_broken_adapter_json(tmp_path, edit, message):
    with pytest.raises(UserError, match=message):
        AdapterDescription.read(edited(tmp_path, edit))


def test_truncated_adapter_json(tmp_path):
    DESCRIPTION.write(tmp_path)
    text = (tmp_path / "adapter.json").read_text()
    (tmp_path / "adapter.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"/adapter\.json is not valid JSON"):
        AdapterDescription.read(tmp_path)
