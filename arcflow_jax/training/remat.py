"""What the backward pass computes again, by the memory that there is."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Var
from jax.sharding import Mesh

from arcflow_jax.networks.conditioning import Conditioning
from arcflow_jax.networks.layers import Remat
from arcflow_jax.parallel.chips import Chip, chip_of
from arcflow_jax.parallel.fits import gpu_share

# Of the memory, what "auto" fills with all that it counts. The rest is for what it does not: the teacher's activations,
# those of one block, gathered weights, the head
FILLED = 0.8


Choice = Remat | Literal["auto"]


def remat_policy(
    choice: Choice,
    graphdef: nnx.GraphDef,
    base: nnx.State,
    adapter: nnx.State,
    conditioning: Conditioning,
    mesh: Mesh,
    held: int,
) -> Remat:
    """The policy that the recipe states; for "auto", that which computes least again of those that fit.

    It is "full" where none fits, or the memory of the mesh's devices is not known.

    Args:
      graphdef, base, adapter, conditioning: of the student, as shapes.
      held: bytes of weights, optimizer state and gradients on one device.
    """
    if choice != "auto":
        return choice
    if (chip := chip_of(mesh.devices.flat[0].device_kind)) is None:
        return "full"
    room = FILLED * usable(chip) - held
    kept = functools.partial(kept_bytes, graphdef, base, adapter, conditioning, mesh)
    return next((policy for policy in ("none", "attention") if kept(policy) <= room), "full")


def kept_bytes(
    graphdef: nnx.GraphDef, base: nnx.State, adapter: nnx.State, conditioning: Conditioning, mesh: Mesh, remat: Remat
) -> int:
    """Bytes that a device keeps for the backward pass of one segment; the states may be abstract.

    They are what the student's forward pass returns to its backward pass and did not get itself, divided by the devices
    that share the batch and the tokens.
    """

    def backward(adapter: nnx.State, base: nnx.State, conditioning: Conditioning) -> Any:
        batch, tokens = conditioning.batch_size, conditioning.positions.shape[0]

        def student(adapter: nnx.State) -> Any:
            model = nnx.merge(graphdef, base, adapter)
            latents = jnp.zeros((batch, tokens, model.backbone.config.in_channels))
            return model.student_curve(latents, jnp.ones(batch), conditioning, jax.random.key(0), remat)

        return jax.vjp(student, adapter)[1]

    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(backward)(adapter, base, conditioning).jaxpr
    results = {x for x in jaxpr.outvars if isinstance(x, Var)} - {*jaxpr.invars, *jaxpr.constvars}
    shares = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "sequence"))
    return sum(x.aval.size * x.aval.dtype.itemsize for x in results) // shares


def usable(chip: Chip) -> float:
    """Bytes of a chip that JAX uses: of a GPU three quarters, if not told otherwise."""
    return chip.memory * (gpu_share() if chip.gpu else 1.0)
