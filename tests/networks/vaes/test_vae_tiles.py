"""Decoding in tiles makes the image of the whole decode."""

# S side of a latent image

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.vaes import vae as module
from arcflow_jax.training.work import inner_jaxprs


def equations(jaxpr: jax.extend.core.Jaxpr) -> int:
    """The equations of a program, those in its loops and calls as well."""
    return sum(1 + sum(equations(each) for each in inner_jaxprs(equation.params)) for equation in jaxpr.eqns)


@pytest.fixture(scope="module", params=["tiny_flux", "tiny_qwen"])
def vae(request) -> nnx.Module:
    directory = ModelDirectory.open(request.getfixturevalue(request.param))
    graphdef, abstract = nnx.split(directory.abstract("vae", jnp.float32))
    return nnx.merge(graphdef, directory.load("vae", abstract))


def smooth_latents(vae: nnx.Module, height: int, width: int) -> jax.Array:
    """Of two images with smooth colours, whose statistics differ from place to place."""
    y, x = np.mgrid[: height * 8, : width * 8] / (height * 8)
    images = np.stack([np.stack([x, y, np.sin(3 * x + 2 * y)], -1), np.stack([y * x, 1 - y, x / 3], -1)])
    return vae.encode(jnp.asarray(images * 1.2 - 0.6, jnp.float32))


@pytest.mark.slow
def test_tiles_are_the_whole_image(vae, monkeypatch):
    """Strips of four rows and, before an upsampling, of two."""
    latents = smooth_latents(vae, 8, 6)
    whole = jax.jit(vae.decode)(latents)
    monkeypatch.setattr(module, "STRIP", 2**8)
    tiled = jax.jit(lambda z: vae.decode(z, tiled=True))(latents)
    assert whole.max() - whole.min() > 1  # of 2
    assert float(jnp.abs(tiled - whole).max()) < 1e-4  # a grey level is 8e-3


def test_the_program_does_not_grow_with_the_image(vae, monkeypatch):
    monkeypatch.setattr(module, "STRIP", 2**11)

    def size(side: int) -> int:
        latents = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
        return equations(jax.make_jaxpr(lambda z: vae.decode(z, tiled=True))(latents).jaxpr)

    assert size(128) == size(64)
