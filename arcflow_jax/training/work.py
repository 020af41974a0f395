"""Floating-point operations of a program, counted in its jaxpr.

XLA's own cost analysis counts a loop body once, and a Pallas kernel or cuDNN's attention not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from arcflow_jax.parallel.chips import chip_of

# The matrix products in cuDNN's fused attention, all of one size. The backward pass computes the scores again
CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def speed(flops_per_second: float) -> dict[str, float | None]:
    """TFLOP a second of each of all devices, and its share of the chip's peak rate (MFU); None of an unknown chip."""
    rate = flops_per_second / jax.device_count()
    chip = chip_of(jax.devices()[0].device_kind)
    return {"tflops_per_device": rate / 1e12, "mfu": None if chip is None else rate / chip.flops}


def flops(jaxpr: Jaxpr) -> int:
    """Operations of matrix products and convolutions on all devices together; a multiply-add counts as two.

    Raises:
      ValueError: if a loop of unknown length contains any.
    """
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def _flops(eqn: JaxprEqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracting)
    if name == "conv_general_dilated":
        kernel, out_features = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        of_one_output = math.prod(size for i, size in enumerate(kernel) if i != out_features)
        return 2 * math.prod(eqn.outvars[0].aval.shape) * of_one_output
    if name in CUDNN_PRODUCTS:
        (b, s, h, e), t = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
        return CUDNN_PRODUCTS[name] * 2 * b * h * s * t * e
    inner = [flops(jaxpr) for jaxpr in inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("a while loop of unknown length holds matrix products: write it as a scan")
    # The body of a shard_map is one device's part, and that of a Pallas kernel is one block's
    times = {
        "scan": lambda: params["length"],
        "shard_map": lambda: math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]),
        "pallas_call": lambda: math.prod(params["grid_mapping"].grid),
    }
    return sum(inner) * times.get(name, lambda: 1)()


def inner_jaxprs(value: Any) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from inner_jaxprs(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from inner_jaxprs(each)
