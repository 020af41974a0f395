"""The programs of a report: where their weights are."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

from arcflow_jax.compile_report import programs
from arcflow_jax.compile_report.programs import WeightOptions, open_model, sampler, text_encoder, training_step
from arcflow_jax.demo import ASSETS
from arcflow_jax.errors import UserError
from arcflow_jax.parallel.mesh import make_mesh
from arcflow_jax.parallel.offload import HOST
from arcflow_jax.storage.bucket import BucketPath
from arcflow_jax.training.recipe import Recipe, read_config

STACKS = {"blocks", "layers", "transformer_blocks", "single_transformer_blocks"}


@pytest.mark.parametrize("offload", [None, "blocks"])
def test_weights_are_placed_as_sampling_places_them(offload):
    """With "blocks", the stacked ones are in host memory, those of quantized kernels included."""
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    config = read_config("tiny")
    config.model = str(ASSETS / "tiny-flux")
    for program in (sampler, text_encoder):
        made = program(Recipe.from_config(config), mesh, 1, WeightOptions("int8", offload))
        state = nnx.to_flat_state(made.arguments[1])
        on_host = {path: x.get_value().sharding.memory_kind == HOST for path, x in state}
        stacked = {path: bool(STACKS & set(path)) for path, _ in state}
        assert on_host == (stacked if offload else dict.fromkeys(stacked, False))
        assert any(path[-1] == "codes" and stacked[path] for path in stacked)


def test_a_training_step_streams_no_blocks():
    config = read_config("tiny")
    config.model = str(ASSETS / "tiny-flux")
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    with pytest.raises(UserError, match="needs all blocks on the device"):
        training_step(Recipe.from_config(config), mesh, 1, WeightOptions(offload="blocks"), steady=True)


def test_a_model_in_a_bucket_is_looked_for_there(monkeypatch):
    opened: list[BucketPath] = []
    monkeypatch.setattr(BucketPath, "is_file", lambda path: False)
    monkeypatch.setattr(programs.ModelDirectory, "open", opened.append)
    open_model("gs://bucket/model")
    assert [str(path) for path in opened] == ["gs://bucket/model"]
