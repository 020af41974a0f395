"""Two processes read what both need from a bucket: each array in one of them only, and both get it bit by bit."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint._src.serialization import tensorstore_utils

from arcflow_jax.checkpoints.training import Checkpoints
from arcflow_jax.models.model_directory import ModelDirectory
from arcflow_jax.networks.layers import Adapter
from arcflow_jax.parallel.mesh import make_mesh, sharded
from arcflow_jax.storage.paths import as_path, sizes_below
from tests.helpers.buckets import bucket, served
from tests.helpers.processes import finish, free_address, start

# A whole number, as a float has many of NaN
ODD = {"negative zero": -0.0, "not a number": np.uint32(0x7FC12345).view(np.float32)}


def adapter() -> nnx.State:
    """Arrays that 4 devices do and do not divide, with numbers that a sum would change."""
    odd = jnp.array([*ODD.values(), 3.0], jnp.float32)
    large = jax.random.normal(jax.random.key(0), (64, 8192))
    small = {name: Adapter(x, axes=(None,)) for name, x in {"odd": odd, "half": odd.astype(jnp.bfloat16)}.items()}
    other = {"count": jnp.arange(5), "bytes": jnp.arange(6, dtype=jnp.int8)}
    small |= {name: Adapter(x, axes=(None,)) for name, x in other.items()}
    scalar = Adapter(jnp.float32(7), axes=())
    return nnx.State(small | {"large": Adapter(large, axes=("embed", None)), "scalar": scalar})


def read_both(place: Path, sizes: tuple[int, ...]) -> dict[str, Any]:
    """The transformer's weights in bfloat16, and the adapter, on a mesh of all devices; by name.

    In a bucket, Orbax reads arrays together that are less than 1 MB apart, with what lies between them. Here nearly all
    are, so that both processes would read nearly all. These are read apart.
    """
    mesh = make_mesh(sizes)
    directory = ModelDirectory.open(place / "model")
    abstract = nnx.state(directory.abstract("transformer", jnp.bfloat16))
    shardings = jax.tree.map(lambda x: x.sharding, sharded(mesh, abstract))
    with mock.patch.object(tensorstore_utils, "is_remote_storage", return_value=False):
        base = directory.load("transformer", abstract, shardings)
        with Checkpoints(place / "run", read_only=True) as checkpoints:
            like = jax.eval_shape(adapter)
            restored = checkpoints.restore_adapter(sharded(mesh, like))
    found = jax.tree.leaves_with_path({"base": base, "adapter": restored})
    return {jax.tree_util.keystr(path): x for path, x in found}


MESHES = [(4, 1, 1, 1), (2, 2, 1, 1)]
PROCESS = """
    import sys
    import jax, numpy as np
    from arcflow_jax.arrays import replicas
    from arcflow_jax.parallel.processes import initialize
    from arcflow_jax.storage.paths import as_path
    from tests.arrays.test_replicas import MESHES, read_both
    place, expected, address, process = sys.argv[1:]
    initialize(address, 2, int(process))
    replicas.SMALL = 0
    expected = np.load(expected)
    for sizes in MESHES:
        found = read_both(as_path(place), sizes)
        assert found.keys() == set(expected.files)
        for name, array in found.items():
            assert array.sharding.device_set == set(jax.devices())
            assert len(array.addressable_shards) == 2
            for part in array.addressable_shards:
                assert np.asarray(part.data).tobytes() == expected[name][part.index].tobytes(), (name, sizes)
"""


@pytest.mark.slow
def test_two_processes_read_every_array_once(tiny_flux, tmp_path):
    pytest.importorskip("gcp_storage_emulator")
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save_ema(adapter())
    (tmp_path / "model").symlink_to(tiny_flux)
    expected = {name: np.asarray(x) for name, x in read_both(tmp_path, (1, 1, 1, 1)).items()}
    raw = {name: x.view(np.uint16) if x.dtype.name == "bfloat16" else x for name, x in expected.items()}
    np.savez(tmp_path / "expected.npz", **raw)
    with bucket("gs") as url:
        for folder in ("model", "run"):
            for name in sizes_below(tmp_path / folder):
                as_path(f"{url}/{folder}/{name}").write_bytes((tmp_path / folder / name).read_bytes())
        (as_path(url) / "run" / "checkpoints" / "0" / "commit_success.txt").write_bytes(b"")
        read_both(as_path(url), (1, 1, 1, 1))
        parts = (f"{url}/model/transformer", f"{url}/run/checkpoints")
        alone = [served(part) for part in parts]
        assert min(alone) > 1.5e6
        command = ["-c", textwrap.dedent(PROCESS), url, tmp_path / "expected.npz", free_address()]
        for process in [start(2, *command, i) for i in (0, 1)]:
            finish(process)
        together = [(served(part) - one) / len(MESHES) for part, one in zip(parts, alone, strict=True)]
    # Twice as much without. Both read the index of all arrays, which is large beside a tiny model
    assert all(two < 1.1 * one for one, two in zip(alone, together, strict=True)), (alone, together)
