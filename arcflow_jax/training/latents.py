"""The VAE's part in distillation with data: real images to latents."""

# B images, N tokens, C latent channels

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax.checkpoints.model_directory import ModelDirectory
from arcflow_jax.data.images import CaptionedImage, pixels
from arcflow_jax.families.latents import pack
from arcflow_jax.parallel.mesh import state_shardings
from arcflow_jax.parallel.processes import from_part


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode(graphdef: nnx.GraphDef, state: nnx.State, images: jax.Array) -> jax.Array:
    vae = nnx.merge(graphdef, state)
    return pack(vae.encode(images.astype(jax.tree.leaves(state)[0].dtype))).astype(jnp.float32)


class LatentEncoder:
    """The autoencoder's part in distillation with data.

    Args:
      directory: a converted model.
      dtype: to compute in.
      mesh: over which the batch is split.
    """

    def __init__(self, directory: ModelDirectory, dtype: Any, mesh: Mesh):
        self.graphdef, abstract = nnx.split(directory.abstract("vae", dtype))
        self.state = directory.load("vae", abstract, state_shardings(mesh, abstract))
        self.mesh = mesh

    def __call__(self, pictures: Sequence[CaptionedImage], height: int, width: int) -> jax.Array:  # [B, N, 4C] float32
        """Latents of pictures, packed; on several processes, of each one's own (see `distributed.local_part`)."""
        images = np.stack([pixels(picture.file, height, width) for picture in pictures])
        return _encode(self.graphdef, self.state, from_part(images, self.mesh))
