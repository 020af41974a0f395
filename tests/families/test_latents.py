"""Packing of latent images into tokens, positions, image sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.errors import UserError
from arcflow_jax.families.latents import centred_positions, pack, position_ids, token_grid, unpack


def test_feature_order_and_token_order():
    image = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    packed = np.asarray(pack(jnp.asarray(image)))
    assert packed.shape == (2, 6, 12)
    for row, column, channel, dy, dx in np.ndindex(2, 3, 3, 2, 2):
        np.testing.assert_array_equal(
            packed[:, row * 3 + column, channel * 4 + dy * 2 + dx], image[:, 2 * row + dy, 2 * column + dx, channel]
        )


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 5), (4, 3)])
def test_unpack_undoes_pack(rows, columns):
    image = np.random.default_rng(0).standard_normal((2, 2 * rows, 2 * columns, 16))
    packed = pack(jnp.asarray(image, jnp.float32))
    np.testing.assert_array_equal(unpack(packed, rows, columns), image.astype(np.float32))


def test_as_diffusers_does_it():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    import torch

    pipeline = diffusers.FluxPipeline
    image = np.random.default_rng(0).standard_normal((2, 16, 6, 10)).astype(np.float32)
    theirs = pipeline._pack_latents(torch.from_numpy(image), 2, 16, 6, 10)
    np.testing.assert_array_equal(pack(jnp.asarray(image.transpose(0, 2, 3, 1))), theirs.numpy())
    ids = pipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    np.testing.assert_array_equal(position_ids(3, 5), ids.numpy())


def test_positions_follow_the_tokens():
    np.testing.assert_array_equal(
        position_ids(2, 3), [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    )


def test_positions_compile_nothing():
    """A small program costs the first image of a process ten milliseconds, even from the cache."""
    compiled = []
    listener = lambda event, *_, **__: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        position_ids(37, 41), centred_positions(37, 41)  # a size of its own, which no other test has compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not [event for event in compiled if "compile" in event]


def test_token_grid():
    assert token_grid(1024, 768, 8) == (64, 48)
    assert token_grid(16, 32, 8) == (1, 2)


@pytest.mark.parametrize(("height", "width"), [(1000, 1024), (1024, 1001), (8, 64), (0, 64), (-64, 64)])
def test_token_grid_names_what_would_be_right(height, width):
    with pytest.raises(UserError, match=f"{height}x{width}.*multiples of 16"):
        token_grid(height, width, 8)
