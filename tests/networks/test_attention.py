"""The attention kernels agree in value and gradient, on one device and on a mesh, and each platform runs its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcflow_jax.networks import attention as module
from arcflow_jax.networks.attention import attention, attention_kernel, blocking, several
from arcflow_jax.parallel.mesh import cuda_capability
from tests.helpers.processes import with_devices


def inputs(b: int, s: int, t: int, h: int, e: int):
    rng = np.random.default_rng(0)
    q, weight = (rng.standard_normal((b, s, h, e)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((b, t, h, e)).astype(np.float32) for _ in range(2))
    return q, k, v, weight


def by_hand(q, k, v, weight):
    """Value, and gradient of Σ weight · value, in float64 NumPy."""
    q, k, v, weight = (np.asarray(x, np.float64) for x in (q, k, v, weight))
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bshe,bthe->bhst", q, k) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bshe,bthe->bhst", weight, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    return np.einsum("bhst,bthe->bshe", p, v), (
        np.einsum("bhst,bthe->bshe", ds, k),
        np.einsum("bhst,bshe->bthe", ds, q),
        np.einsum("bhst,bshe->bthe", p, weight),
    )


# A short sequence that splash pads, one that chunks do not divide evenly, one with fewer queries than keys
@pytest.mark.parametrize("shape", [(2, 32, 32, 2, 128), (1, 2200, 2200, 1, 128), (1, 150, 512, 2, 128)])
@pytest.mark.parametrize("kernel", ["xla", "chunked", "splash"])
def test_kernels_are_attention(kernel, shape, monkeypatch):
    monkeypatch.setattr(module, "SPLASH_BYTES", 512)  # the large blocks, in float32
    q, k, v, weight = inputs(*shape)
    value, gradients = by_hand(q, k, v, weight)
    with attention_kernel(kernel), jax.default_matmul_precision("highest"):
        ours, vjp = jax.vjp(attention, q, k, v)
        ours_gradients = vjp(weight)
    np.testing.assert_allclose(ours, value, atol=1e-5)
    for mine, theirs in zip(ours_gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("kernel", ["xla", "chunked", "splash"])
def test_keys_past_the_length_do_not_count(kernel):
    """The result is as if the keys ended at the length of the example; keys beyond it get no gradient."""
    q, k, v, weight = inputs(2, 600, 300, 1, 128)
    lengths = [300, 130]
    with attention_kernel(kernel), jax.default_matmul_precision("highest"):
        ours, vjp = jax.vjp(lambda *qkv: attention(*qkv, jnp.array(lengths)), q, k, v)
        ours_gradients = vjp(weight)
    for i, n in enumerate(lengths):
        value, (dq, dk, dv) = by_hand(*(x[i : i + 1] for x in (q, k[:, :n], v[:, :n], weight)))
        np.testing.assert_allclose(ours[i : i + 1], value, atol=1e-5)
        for mine, theirs in zip(ours_gradients, (dq, dk, dv), strict=True):
            np.testing.assert_allclose(mine[i, : theirs.shape[1]], theirs[0], atol=2e-5 * np.abs(theirs).max())
            assert not np.any(mine[i, theirs.shape[1] :])


def test_softmax_is_float32():
    """In bfloat16 the inputs and probabilities are rounded, but the scores are not."""
    q, k, v, weight = inputs(1, 640, 640, 1, 128)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q * 8, k, v))
    value, _ = by_hand(q, k, v, weight)
    for kernel in ("xla", "chunked", "splash"):
        with attention_kernel(kernel):
            ours = attention(q, k, v)
        assert ours.dtype == jnp.bfloat16
        # Scores reach 40, where bfloat16 is off by up to 0.1, and a probability by a tenth
        assert np.abs(np.asarray(ours, np.float64) - value).mean() < 0.005  # scores in bfloat16 give 0.009


@pytest.mark.parametrize(
    ("platform", "tokens", "head_dim", "dtype", "kernel"),
    [
        ("9.0", 4608, 128, jnp.bfloat16, "cudnn"),
        ("8.0", 32, 32, jnp.float16, "cudnn"),
        ("12.0", 4608, 128, jnp.bfloat16, "cudnn"),
        ("9.0", 4608, 128, jnp.float32, "chunked"),  # cuDNN has 16 bits only
        ("9.0", 4608, 512, jnp.bfloat16, "chunked"),
        ("9.0", 4608, 36, jnp.bfloat16, "chunked"),
        ("7.5", 4608, 128, jnp.float16, "chunked"),  # a T4
        ("7.0", 4608, 128, jnp.float16, "chunked"),  # a V100
        ("7.0", 1024, 128, jnp.float16, "xla"),
        ("gfx942", 4608, 128, jnp.bfloat16, "chunked"),  # an MI300X
        ("tpu", 4608, 128, jnp.bfloat16, "splash"),
        ("tpu", 4608, 128, jnp.float32, "splash"),
        ("tpu", 4608, 64, jnp.bfloat16, "chunked"),
        ("tpu", 32, 128, jnp.bfloat16, "xla"),
        ("cpu", 4608, 128, jnp.bfloat16, "chunked"),
        ("cpu", 1024, 128, jnp.bfloat16, "xla"),
        ("cpu", 1025, 128, jnp.bfloat16, "chunked"),
    ],
)
def test_each_platform_runs_its_kernel(monkeypatch, platform, tokens, head_dim, dtype, kernel):
    """`attention` itself is called, with every kernel replaced by one that notes its name."""
    ran = []

    def noting(name):
        def stand_in(q, k, v, lengths, **options):
            ran.append((name, options))
            return q

        return stand_in

    for name in ("xla", "cudnn", "chunked", "splash"):
        monkeypatch.setattr(module, name, noting(name))
    if platform not in ("cpu", "tpu"):  # a GPU, by its compute capability
        gpu = types.SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=platform)
        monkeypatch.setattr(jax, "devices", lambda: [gpu])
        platform = "gpu"
    monkeypatch.setattr(module, "platform", lambda mesh: platform)
    q = jax.ShapeDtypeStruct((1, tokens, 4, head_dim), dtype)
    jax.eval_shape(lambda q: attention(q, q, q), q)  # a new function, because JAX caches traces by function
    options = {"splash": {"interpret": False}, "chunked": {"most": 128 if platform == "cpu" else 512}}
    assert ran == [(kernel, options.get(kernel, {}))]


def test_devices_that_are_not_here_are_known_by_their_kind():
    def mesh(kind):
        return types.SimpleNamespace(abstract_device=types.SimpleNamespace(device_kind=kind))

    assert cuda_capability(mesh("NVIDIA H100 80GB HBM3")) == (9, 0)
    assert cuda_capability(mesh("NVIDIA GeForce RTX 3090")) == (8, 6)
    assert cuda_capability(mesh("TPU v5p")) is cuda_capability(mesh("AMD Instinct MI300X")) is None


def test_the_platform_is_that_of_the_mesh():
    assert module.platform(jax.sharding.get_abstract_mesh()) == jax.default_backend() == "cpu"
    tpus = types.SimpleNamespace(abstract_device=types.SimpleNamespace(platform="tpu"))
    assert module.platform(tpus) == "tpu"


def test_override_is_part_of_the_jit_key():
    traced = []

    @jax.jit
    def f(q):
        traced.append(attention_kernel.value)
        return attention(q, q, q)

    q = jnp.ones((1, 8, 1, 8))
    f(q)
    with attention_kernel("chunked"):
        f(q)
        f(q)
    assert traced == [None, "chunked"]
    with (
        attention_kernel("flash"),
        pytest.raises(ValueError, match="unknown attention kernel 'flash'; the kernels are xla"),
    ):
        f(q)


def test_blocks_need_little_padding():
    assert blocking(4608) == (512, 4608)  # FLUX.1 at 1024²
    assert blocking(2304) == (384, 2304)  # half of it
    assert blocking(1152) == (384, 1152)
    assert blocking(32) == (256, 256)
    assert blocking(4609) == (256, 4864)


def test_several_blocks_divide_the_sequence():
    assert several(512, 4608, 1536) == 1536  # FLUX.1 at 1024²
    assert several(512, 4096, 1536) == 1024
    assert several(384, 2304, 1536) == 1152
    assert several(256, 4864, 1536) == 256  # nineteen of them


ON_A_MESH = """
    import jax, numpy as np
    from arcflow_jax.networks.attention import attention, attention_kernel
    from arcflow_jax.parallel.mesh import make_mesh

    rng = np.random.default_rng(0)

    def both(q, k, v, lengths):
        value, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, lengths), q, k, v)
        return value, *vjp(jax.numpy.cos(value))

    # Heads over tensor and sequence; heads over tensor, queries over sequence; sizes that no mesh axis divides
    for shape, parts, lengths in [
        ((2, 300, 4, 128), 8, None), ((2, 300, 2, 128), 8, np.array([290, 7])), ((1, 129, 3, 128), 1, None)
    ]:
        q, k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
        with attention_kernel("xla"):
            expected = jax.jit(both)(q, k, v, lengths)
        for kernel in ("chunked", "splash"):
            with jax.set_mesh(make_mesh((2, 1, 2, 2))), attention_kernel(kernel):
                ours = jax.jit(both)(q, k, v, lengths)
            for x, y in zip(ours, expected, strict=True):
                np.testing.assert_allclose(x, y, atol=2e-6 * max(10, np.abs(y).max()))
            assert len({str(shard.index) for shard in ours[0].addressable_shards}) == parts, ours[0].sharding
"""


@pytest.mark.slow
def test_kernels_on_a_mesh():
    """Each of 8 devices computes its own part of value and gradient; sizes that do not divide are replicated."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_A_MESH)],
        env=os.environ | with_devices(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
