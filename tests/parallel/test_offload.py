"""Offloaded weights are on the device only while a function uses them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax.errors import UserError
from arcflow_jax.models.quantize import quantize_model
from arcflow_jax.parallel.offload import HOST, Weights
from arcflow_jax.pipeline import ArcFlowPipeline
from tests.helpers.command_line import run
from tests.helpers.random_student import write_adapter

STATE = {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}


def on_device() -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, STATE)


def test_weights_leave_the_device_after_the_function():
    seen = []

    def total(state):
        seen.extend(jax.tree.leaves(state))
        return sum(x.sum() for x in jax.tree.leaves(state))

    weights = Weights(on_device(), offload=True)
    for _ in range(2):
        assert weights.run(total) == 18
    assert len(seen) == 4
    assert all(x.is_deleted() for x in seen)


def test_weights_leave_the_device_if_the_function_raises():
    seen = []

    def fails(state):
        seen.extend(jax.tree.leaves(state))
        raise RuntimeError("no memory")

    weights = Weights(on_device(), offload=True)
    with pytest.raises(RuntimeError, match="no memory"):
        weights.run(fails)
    assert len(seen) == 2
    assert all(x.is_deleted() for x in seen)
    assert weights.run(lambda state: state["bias"].sum()) == 3  # the copy in host memory is still there


def test_weights_that_are_not_offloaded_stay():
    state = on_device()
    Weights(state).run(lambda state: state["bias"].sum())
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def memory(state) -> dict[str, int]:
    """Bytes of a state by kind of memory."""
    sizes = {"device": 0, HOST: 0}
    for x in jax.tree.leaves(state):
        sizes[x.sharding.memory_kind] += x.nbytes
    return sizes


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_blocks_are_streamed(tiny_flux, tmp_path, quantize):
    """The same image to the bit as with all weights on the device, which hold only what is in no block."""
    model = tiny_flux if quantize is None else quantize_model(tiny_flux, tmp_path / "model", quantize)
    student = write_adapter(tiny_flux, tmp_path / "run", seed=1)
    plain = ArcFlowPipeline.from_pretrained(model, student, merge=False)
    streamed = ArcFlowPipeline.from_pretrained(model, student, offload="blocks")
    held = []
    sample = streamed._denoise
    streamed._denoise = lambda state, *rest: held.append(memory(state)) or sample(state, *rest)
    images = [pipe("a red circle", seed=3, output_type="np").images for pipe in (plain, streamed)]
    np.testing.assert_array_equal(*images)
    (running,) = held
    assert running["device"] + running[HOST] == sum(memory(plain.transformer.state).values())
    blocks = {name for name in ("transformer_blocks", "single_transformer_blocks")}
    flat = nnx.to_flat_state(streamed.transformer.state)
    assert running[HOST] == sum(x.get_value().nbytes for path, x in flat if blocks & set(path))
    for network in (streamed.transformer, streamed.prompt_encoder.weights, streamed.vae):
        assert memory(network.state)["device"] == 0  # between two images


def test_a_cpu_streams_nothing_and_says_so(tiny_flux, tmp_path, capfd):
    options = ("--model", tiny_flux, "--teacher", "--steps", "1", "--prompt", "a", "--out", tmp_path / "images")
    code, _, stderr = run(capfd, "sample", *options, "--offload", "blocks")
    assert code == 0, stderr
    assert "--offload blocks has no effect: a CPU has no memory but the host's" in stderr


def test_lora_is_not_merged_into_streamed_blocks(tiny_flux, tmp_path):
    student = write_adapter(tiny_flux, tmp_path / "run", seed=1)
    with pytest.raises(UserError, match="LoRA cannot be merged into blocks in host memory"):
        ArcFlowPipeline.from_pretrained(tiny_flux, student, offload="blocks", merge=True)
