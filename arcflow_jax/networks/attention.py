"""Softmax attention: one function, and a kernel for each platform.

    cudnn      NVIDIA GPUs of compute capability 8.0 and more, fused: bfloat16 or float16, heads of up to 128
    splash     TPUs, fused: heads of 128 or 256
    chunked    anywhere, such as on a T4, a V100 or AMD's GPUs: the scores of a few hundred queries at a time
    xla        anywhere: all scores at once, for short sequences

The platform is that of the mesh in context (`jax.set_mesh`), which this machine may not have; without a mesh it is
JAX's default. On a mesh of several devices, each device computes its own examples and heads, or its own queries,
against the keys and values of the whole sequence.
"""

# B batch, S queries, T keys, H heads, E head dim

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec

from arcflow_jax.networks.layers import ATTENTION
from arcflow_jax.parallel.mesh import cuda_capability, partition_spec, platform

# `with attention_kernel("chunked"): …` overrides the choice of kernel; it is part of jit's cache key
attention_kernel = jax.make_user_context(None)

SHORT = 1024  # up to this many tokens, the memory for all scores at once is not worth saving
# Queries of a chunk. On CPUs the scores of this many stay in the cache. Accelerators want large matrix products; of
# FLUX.1 at 1024², 4608 keys and 24 heads, 512 queries have 216 MiB of float32 scores, all have 1.9 GiB
CPU_CHUNK, CHUNK = 128, 512
SPLASH_BLOCKS = (512, 384, 256)
SPLASH_MOST = 2048  # keys that the backward pass has in fast memory
# Largest block of queries, and of keys, in the forward pass, if a head's features take at most SPLASH_BYTES: the kernel
# has fewer steps, and reads keys and values less often. MaxDiffusion takes as many for FLUX.1 on v6e
# (base_flux_dev.yml). Wider heads do not fit into v5p's 16 MiB. BENCHMARKS.md has the compiler's counts
SPLASH_FORWARD, SPLASH_BYTES = 1536, 256


def attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    """softmax(q kᵀ / √E) v of queries [B, S, H, E] and keys and values [B, T, H, E]: [B, S, H, E].

    Scores and softmax are float32. Every kernel gives the same result to rounding.

    Args:
      q, k, v: as above.
      lengths: the number of keys of each example that are attended, from the first, [B] int32, each at least 1; None
        for all keys.

    Raises:
      ValueError: if `attention_kernel` names an unknown kernel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    on = platform(mesh)
    name = attention_kernel.value or choose(on, q, cuda_capability(mesh) if on == "gpu" else None)
    kernels = {"xla": xla, "cudnn": cudnn, "chunked": chunked, "splash": splash}
    if name not in kernels:
        raise ValueError(f"unknown attention kernel {name!r}; the kernels are {', '.join(kernels)}")
    options = {"splash": {"interpret": on != "tpu"}, "chunked": {"most": CPU_CHUNK if on == "cpu" else CHUNK}}
    kernel = functools.partial(kernels[name], **options.get(name, {}))
    if mesh.size <= 1:
        return kernel(q, k, v, lengths)
    queries = query_spec(mesh, q.shape)
    keys = PartitionSpec(queries[0], None, queries[2])
    # check_vma=False, because Pallas kernels do not declare over which mesh axes their results vary
    specs = (queries, keys, keys, PartitionSpec(queries[0]))
    return jax.shard_map(kernel, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, lengths)


def choose(platform: str, q: jax.Array | jax.ShapeDtypeStruct, capability: tuple[int, int] | None) -> str:
    """The name of the kernel for queries [B, S, H, E]; `capability` is the CUDA compute capability of NVIDIA GPUs."""
    tokens, head_dim = q.shape[1], q.shape[3]
    fused = capability is not None and capability >= (8, 0)
    if fused and q.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    if tokens <= SHORT:
        return "xla"
    return "splash" if platform == "tpu" and head_dim in (128, 256) else "chunked"


def query_spec(mesh: AbstractMesh, shape: tuple[int, ...]) -> PartitionSpec:
    """How queries [B, S, H, E] are sharded over a mesh.

    Heads are sharded over `sequence` as well (arXiv 2309.14509). Where there are too few heads for that, the queries
    are sharded over `sequence` instead.
    """
    by_heads = partition_spec(mesh, ("batch", None, "attending_heads", None), shape)
    if "sequence" in jax.tree.leaves(tuple(by_heads)):
        return by_heads
    return partition_spec(mesh, ("batch", "tokens", "heads", None), shape)


def xla(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> jax.Array:
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="xla")
    return checkpoint_name(out, ATTENTION)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, most: int = CHUNK) -> jax.Array:
    """Equal chunks of at most `most` queries, one at a time; the backward pass recomputes their scores."""
    b, s, h, e = q.shape
    chunks = -(-s // most)
    size = -(-s // chunks)
    q = pad(q, chunks * size).reshape(b, chunks, size, h, e).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda q: xla(q, k, v, lengths)), q)
    return checkpoint_name(out.swapaxes(0, 1).reshape(b, chunks * size, h, e)[:, :s], ATTENTION)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, interpret: bool = False) -> jax.Array:
    """JAX's fused kernel for TPUs (FlashAttention-2, Dao 2023, arXiv 2307.08691); `interpret` runs it elsewhere.

    Sequences are padded to whole blocks. Padded keys, and keys that are not attended, get a segment id that no query
    has.
    """
    # Imported late: Pallas takes a second to import, and only TPUs need it
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    b, s, t = q.shape[0], q.shape[1], k.shape[1]
    (block_q, padded_s), (block_k, padded_t) = blocking(s), blocking(t)
    large = q.shape[-1] * q.dtype.itemsize <= SPLASH_BYTES
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not scale its scores
    q, k, v = (pad(x, length).swapaxes(1, 2) for x, length in ((q, padded_s), (k, padded_t), (v, padded_t)))
    kernel = lib.make_splash_mha(
        lib.MultiHeadMask([lib.FullMask((padded_s, padded_t))] * q.shape[1]),
        block_sizes=lib.BlockSizes(
            block_q=several(block_q, padded_s, SPLASH_FORWARD if large else block_q),
            block_kv=several(block_k, padded_t, SPLASH_FORWARD if large else block_k),
            block_kv_compute=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=several(block_k, padded_t, SPLASH_MOST),
            block_kv_dkv_compute=block_k,
            # One kernel for all gradients computes scores and their gradients once, where two kernels do it twice. Each
            # of its blocks of keys writes a gradient of the queries, so the blocks are large
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    segments = None
    if padded_t != t or lengths is not None:
        ends = jnp.full(b, t) if lengths is None else lengths
        outside = jnp.arange(padded_t) >= ends[:, None]
        segments = lib.SegmentIds(jnp.zeros((b, padded_s), jnp.int32), outside.astype(jnp.int32))
    out = jax.vmap(kernel)(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :s]


def blocking(length: int) -> tuple[int, int]:
    """Block size and padded length of a sequence: the least padding first, then the largest block."""
    padded, block = min((-(-length // block) * block, -block) for block in SPLASH_BLOCKS)
    return -block, padded


def several(block: int, padded: int, most: int) -> int:
    """The largest multiple of a block that divides a padded length, up to `most`."""
    return max(size for size in range(block, most + 1, block) if padded % size == 0)


def pad(x: jax.Array, length: int) -> jax.Array:
    """A sequence [B, S, H, E] padded with zeros at its end, to `length`."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
