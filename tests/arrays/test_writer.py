"""Checkpoints written layer by layer: ordinary to Orbax, and never in memory as a whole."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from arcflow_jax.arrays import writer
from arcflow_jax.arrays.writer import Stream, write_checkpoint
from arcflow_jax.errors import UserError

LAYERS, LAYER = 64, (64, 512)  # 64 KiB a layer
LAYER_BYTES = 2 * 64 * 512


def layer(index: int) -> np.ndarray:
    return np.random.default_rng(index).standard_normal(LAYER).astype(ml_dtypes.bfloat16)


def stream() -> Stream:
    return Stream((LAYERS, *LAYER), np.dtype(ml_dtypes.bfloat16), True, lambda: map(layer, range(LAYERS)))


def test_what_is_written_is_an_ordinary_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", LAYER_BYTES // 4)
    whole = np.arange(5, dtype=np.float32)
    write_checkpoint(
        tmp_path / "state", {"a": {"0": stream()}, "b": Stream((5,), whole.dtype, False, lambda: iter([whole]))}
    )
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "state")
    np.testing.assert_array_equal(tree["b"], whole)
    np.testing.assert_array_equal(tree["a"]["0"], np.stack([layer(i) for i in range(LAYERS)]))
    metadata = ocp.StandardCheckpointHandler().metadata(tmp_path / "state").tree
    chunk = metadata["a"]["0"].storage.chunk_shape  # what a sharded restore reads is a multiple of it
    assert chunk[0] == 1
    assert 2 * np.prod(chunk) == LAYER_BYTES // 4


def test_memory_holds_a_few_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "IN_FLIGHT_BYTES", 4 * LAYER_BYTES)
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def layers() -> Iterator[np.ndarray]:
        nonlocal alive, most
        for index in range(LAYERS):
            array = layer(index)
            weakref.finalize(array, gone)
            alive += 1
            most = max(most, alive)
            yield array

    write_checkpoint(tmp_path / "state", {"a": Stream((LAYERS, *LAYER), np.dtype(ml_dtypes.bfloat16), True, layers)})
    assert 1 < most <= 6  # those in flight, the one that was just made, and the one before it


def test_an_error_while_reading_comes_through(tmp_path):
    def layers() -> Iterator[np.ndarray]:
        yield from map(layer, range(LAYERS // 2))
        raise UserError("layer 32 holds NaN")

    with pytest.raises(UserError, match="layer 32 holds NaN"):
        write_checkpoint(tmp_path / "state", {"a": Stream((LAYERS, *LAYER), np.dtype("bfloat16"), True, layers)})
    assert not (tmp_path / "state").exists()


def test_a_disk_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        write_checkpoint(tmp_path / "file" / "state", {"a": stream()})


def test_paths_that_orbax_takes_for_patterns_are_refused(tmp_path):
    """It would not find what it has just written, and say nothing."""
    with pytest.raises(
        UserError, match=r"cannot write checkpoints to .*/\[a\]: name a directory without \*, \?, \[ or"
    ):
        write_checkpoint(tmp_path / "[a]", {})
    assert not list(tmp_path.iterdir())
