"""The VAE's part in distillation with images: real images, or reference images, to latents."""

# B images, N tokens, R tokens of an example's reference images, C latent channels, I images of an example

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from arcflow_jax.data.images import CaptionedImages, pixels
from arcflow_jax.families.latents import pack
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.conditioning import References
from arcflow_jax.parallel.mesh import batched, state_shardings
from arcflow_jax.parallel.processes import from_rows
from arcflow_jax.training.state import in_parts


@functools.partial(jax.jit, static_argnames=("graphdef", "parts"))
def _encode(graphdef: nnx.GraphDef, state: nnx.State, images: jax.Array, parts: int) -> jax.Array:
    def encode(images: jax.Array) -> jax.Array:
        vae = nnx.merge(graphdef, state)
        return pack(vae.encode(images.astype(jax.tree.leaves(state)[0].dtype))).astype(jnp.float32)

    return in_parts(encode, parts, len(images) // parts, images)


class LatentEncoder:
    """Encodes images with the VAE, for distillation with images.

    Args:
      directory: a converted model.
      dtype: of the arithmetic.
      mesh: that the batch is sharded over.
      accumulate: micro-batches that the batch is encoded in, one after another.
    """

    def __init__(self, directory: ModelDirectory, dtype: Any, mesh: Mesh, accumulate: int = 1):
        self.graphdef, abstract = nnx.split(directory.abstract("vae", dtype))
        self.state = directory.load("vae", abstract, state_shardings(mesh, abstract))
        self.mesh, self.accumulate = mesh, accumulate
        self.workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def pixels(self, examples: Sequence[CaptionedImages], height: int, width: int) -> np.ndarray:
        """This process's images of a batch, [I, B, H, W, 3], decoded by several threads: Pillow works beside Python."""
        files = [file for place in zip(*(example.files for example in examples), strict=True) for file in place]
        images = np.stack(list(self.workers.map(lambda file: pixels(file, height, width), files)))
        return images.reshape(-1, len(examples), *images.shape[1:])

    def references(self, own: np.ndarray, positions: jax.Array) -> References:
        """The reference images [I, B, H, W, 3] of a batch, of which each process gives its rows, with positions."""
        tokens = jnp.concatenate([self(images) for images in own], axis=1)  # [B, R, 4C]
        return References(jax.device_put(tokens, batched(self.mesh)), positions)

    def __call__(self, own: np.ndarray) -> jax.Array:  # [B, N, 4C] float32
        """Packed latents of the whole batch; each process gives the pixels of its rows (see `processes.local_rows`)."""
        images = from_rows(own, self.mesh)
        rows = len(images) // (self.mesh.shape["data"] * self.mesh.shape["fsdp"])  # of a device; previews have few
        tokens = _encode(self.graphdef, self.state, images, math.gcd(self.accumulate, rows))
        return jax.device_put(tokens, batched(self.mesh))  # where the compiled training steps take them
