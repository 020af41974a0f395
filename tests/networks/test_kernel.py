"""Quantized kernels: codes and scales, products and gradients, and the layers that get them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from arcflow_jax.errors import UserError
from arcflow_jax.networks.kernel import DTYPES, GROUP, QuantizedKernel, fits, pack, quantize, unpack
from arcflow_jax.networks.layers import TEACHER, Base, Linear, linear_layers, scan_blocks, stack
from arcflow_jax.networks.lora import attach_lora
from arcflow_jax.networks.quantization import Quantization, chosen_layers, compute_in, quantize_layers

FORMATS = list(DTYPES)
D_IN, D_OUT = 3 * GROUP, 40


def random_kernel(seed: int = 0, shape: tuple[int, ...] = (D_IN, D_OUT)) -> jax.Array:
    """Output channels of very different sizes, one of them 0."""
    kernel = np.random.default_rng(seed).standard_normal(shape) * np.logspace(-4, 2, shape[-1])
    kernel[..., 3] = 0
    return jnp.asarray(kernel, jnp.float32)


def dequantized(kernel: jax.Array, format: str) -> jax.Array:
    codes, scale = quantize(kernel, format)
    codes = unpack(codes) if format == "int4" else codes
    return codes.astype(jnp.float32) * jnp.repeat(scale.astype(jnp.float32), len(kernel) // len(scale), axis=0)


def loaded(kernel: jax.Array, format: str) -> QuantizedKernel:
    quantized = QuantizedKernel(Base(kernel, axes=("embed", "mlp")), format)
    quantized.codes[...], quantized.scale[...] = quantize(kernel, format)
    return quantized


def test_packing_loses_nothing():
    codes = np.stack(np.meshgrid(np.arange(-8, 8), np.arange(-8, 8)), axis=0).reshape(2, 256).astype(np.int8)
    codes = np.concatenate([codes, codes[::-1]])  # all pairs, in two rows of bytes
    packed = pack(jnp.asarray(codes))
    assert packed.shape == (2, 256)
    np.testing.assert_array_equal(unpack(packed), codes)


@pytest.mark.parametrize("format", FORMATS)
def test_each_weight_is_within_half_a_step(format):
    kernel = random_kernel()
    largest = jnp.abs(kernel.reshape(-1, GROUP if format == "int4" else D_IN, D_OUT)).max(1, keepdims=True)
    largest = jnp.broadcast_to(largest, (len(largest), D_IN // len(largest), D_OUT)).reshape(kernel.shape)
    # int8: 127 steps; int4: 7.5 steps, and a scale with 8 bits; fp8: 4 bits of each number, and fixed steps near 0
    bound = {
        "int8": 0.5 / 127 * largest,
        "int4": (0.5 / 7.5 + 2.0**-8) * largest,
        "fp8": 2.0**-4 * jnp.abs(kernel) + 2.0**-10 / 448 * largest,
    }[format]
    error = jnp.abs(dequantized(kernel, format) - kernel)
    assert (error <= 1.001 * bound).all()
    assert (error[:, 3] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_product_and_gradient_are_those_of_the_dequantized_kernel(format, dtype):
    kernel = random_kernel()
    plain = dequantized(kernel, format).astype(dtype)
    x, seen = (
        jnp.asarray(np.random.default_rng(i).standard_normal((2, 5, n)), dtype) for i, n in ((1, D_IN), (2, D_OUT))
    )
    ours, back = jax.vjp(loaded(kernel, format).multiply, x)
    theirs, expected = jax.vjp(lambda x: x @ plain, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(back(seen)[0], expected(seen)[0])
    assert ours.dtype == dtype


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_products_in_8_bits(format):
    kernel = loaded(random_kernel(), format)
    x = jnp.asarray(
        np.random.default_rng(1).standard_normal((2, 5, D_IN)) * np.logspace(-3, 3, 5)[:, None], jnp.float32
    )
    exact = kernel.multiply(x)
    kernel.compute = format
    made = kernel.multiply(x)
    lowered = jax.jit(kernel.multiply).lower(x).as_text()
    assert ("xi8>" if format == "int8" else "f8E4M3FN>") in lowered.split("dot_general")[1].splitlines()[0]
    # Every token has a scale of its own. Its rounding, as of the weights, see above, times the sizes of the weights
    step = {"int8": 0.5 / 127 * jnp.abs(x).max(-1, keepdims=True), "fp8": (2.0**-4 + 2.0**-10) * jnp.abs(x)}[format]
    sizes = jnp.abs(dequantized(random_kernel(), format))
    error = jnp.abs(made - exact)
    assert (error > 0).any()
    assert (error <= 1.001 * jnp.broadcast_to(step, x.shape) @ sizes + 1e-6).all()


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = Linear(64, 96, rngs=rngs)
        self.down = Linear(96, 64, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, mode: object) -> jax.Array:
        return x + self.down(jax.nn.silu(self.up(x, mode)), mode)


class Network(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = Linear(16, 64, rngs=rngs)
        self.blocks = stack(Block, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return scan_blocks(self.blocks, self.embed(x), lambda block, x, mode: block(x, mode), TEACHER)


@pytest.mark.parametrize("format", FORMATS)
def test_stacked_blocks(format):
    """A network with quantized kernels is the network with dequantized ones."""
    plain, quantized = Network(), Network()
    chosen = chosen_layers(quantized, format, kept=("embed",))
    assert chosen == Quantization(format, ("blocks.down", "blocks.up"))
    quantize_layers(quantized, chosen)
    for path in chosen.layers:
        whole, layer = linear_layers(plain)[path], linear_layers(quantized)[path]
        assert layer.kernel.shape == whole.kernel.shape
        assert layer.kernel.axes == whole.kernel.axes
        parts = [quantize(kernel, format) for kernel in whole.kernel[...]]
        layer.kernel.codes[...], layer.kernel.scale[...] = (jnp.stack(each) for each in zip(*parts, strict=True))
        whole.kernel[...] = jnp.stack([dequantized(kernel, format) for kernel in whole.kernel[...]])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16)), jnp.float32)
    np.testing.assert_allclose(quantized(x), plain(x), rtol=1e-6, atol=1e-6)
    (path,) = attach_lora(quantized, ["blocks.up"], rank=4, alpha=4.0, dropout=0.0)
    assert linear_layers(quantized)[path].lora.a.shape == (3, 64, 4)


def test_int4_wants_whole_groups():
    assert not fits((3, GROUP + 2, 8), "int4")
    assert fits((3, GROUP + 2, 8), "int8")
    assert chosen_layers(Network(), "int4", kept=()).layers == ("blocks.down", "blocks.up")  # not 16 inputs


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"no linear layers blocks\.left"):
        quantize_layers(Network(), Quantization("int8", ("blocks.left", "blocks.up")))
    network = Network()
    with pytest.raises(UserError, match="products in fp8 need fp8 weights, but those of this model are not quantized"):
        compute_in(network, "fp8")
    quantize_layers(network, Quantization("int8", ("blocks.up",)))
    with pytest.raises(UserError, match="those of this model are int8"):
        compute_in(network, "fp8")
    compute_in(network, "int8")
    assert linear_layers(network)["blocks.up"].kernel.compute == "int8"


def test_qwix_reads_our_codes():
    """The products of codes are qwix's own, so its idea of a quantized array has to be ours."""
    kernel = random_kernel()
    codes, scale = quantize(kernel, "int8")
    np.testing.assert_allclose(qwix.dequantize(qwix.QArray(codes, scale)), dequantized(kernel, "int8"), rtol=1e-6)
