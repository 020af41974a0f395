"""`arcflow doctor`."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from arcflow_jax.cli.options import path_option
from arcflow_jax.errors import of_files

if TYPE_CHECKING:
    import jax

PACKAGES = ("arcflow_jax", "jax", "jaxlib", "flax", "orbax-checkpoint")
# Those that are installed; * stands for the version of CUDA or ROCm
ACCELERATORS = ("libtpu", "jax-cuda*-plugin", "jax-rocm*-plugin", "nvidia-cudnn-cu*", "nvidia-nccl-cu*")


def doctor(
    bucket: Annotated[
        Path | None,
        path_option(help="gs://NAME or s3://NAME, or a folder in it: lists it, writes a small object and removes it."),
    ] = None,
) -> None:
    """Prints what this machine has, and what fits on it: devices, memory, kernels, versions, caches, models.

    Exits with 2 if something is broken, with 1 if the bucket does not answer.
    """
    print("versions")
    for name, version in versions().items():
        print(f"  {name} {version}")
    print("devices")
    for line in devices():
        print(f"  {line}")
    print("caches")
    for name, place in caches().items():
        print(f"  {name}: {place}, {size_of(place)}")
    if bucket is not None:
        print(f"bucket\n  {check_bucket(bucket)}")


def versions() -> dict[str, str]:
    """The version of each package, and of the compilers for accelerators that are installed."""
    found = {each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}
    plugins = [name for name in sorted(found) if any(fnmatch.fnmatch(name, each) for each in ACCELERATORS)]
    return {name: found.get(name.replace("_", "-"), "is not installed") for name in (*PACKAGES, *plugins)}


def caches() -> dict[str, Path]:
    """Where compiled programs, converted models and downloads are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from arcflow_jax.storage.cache import cache_folder
    from arcflow_jax.storage.paths import as_path

    own = cache_folder()
    compiled = as_path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or own / "xla")
    return {"compiled programs": compiled, "converted models": own / "models", "hub": Path(HF_HUB_CACHE)}


def size_of(folder: Path) -> str:
    from arcflow_jax.parallel.chips import GIB
    from arcflow_jax.storage.paths import sizes_below

    if not folder.is_dir():
        return "empty"
    return f"{sum(sizes_below(folder).values()) / GIB:.2f} GiB"


def check_bucket(place: Path) -> str:
    """What access there is. Raises UserError, in one line, if a bucket cannot be listed, written or cleared."""
    name = place / f".arcflow-doctor-{uuid.uuid4().hex}"
    step, count = "listed", 0
    try:
        with contextlib.suppress(FileNotFoundError):  # a folder that is still to be written
            count = len(list(place.iterdir()))
        step = "written"
        name.write_bytes(b"arcflow doctor")
        step = "read"
        if name.read_bytes() != b"arcflow doctor":
            raise OSError("it holds something else")
        step = "cleared of what was written there"
        name.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)
        raise of_files(f"{place} cannot be {step}", error) from error
    return f"{place}: listed ({count} entries), written, read and removed"


def devices() -> list[str]:
    """Devices, kernel and precision, and what fits."""
    import jax

    from arcflow_jax.generate import default_dtype
    from arcflow_jax.networks.attention import choose
    from arcflow_jax.parallel.mesh import capability_of

    here, lines = jax.local_devices(), []
    for device in here:
        capability = capability_of(device)
        known = f", compute capability {'.'.join(map(str, capability))}" if capability else ""
        lines.append(f"{device.id}: {device.device_kind}, {device.platform}{known}, {memory_of(device)}")
    dtype = jax.numpy.dtype(default_dtype())
    queries = jax.ShapeDtypeStruct((1, 4608, 24, 128), dtype)
    kernel = choose(here[0].platform, queries, capability_of(here[0]))
    lines.append(f"precision {dtype.name}, attention kernel {kernel} (FLUX.1 at 1024x1024)")
    return [*lines, *what_fits(here[0])]


def memory_of(device: jax.Device) -> str:
    from arcflow_jax.generate import memory_share
    from arcflow_jax.parallel.chips import GIB

    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return "memory of the machine"
    share = memory_share(device)
    whole = "" if share is None else f" of {limit / share / GIB:.1f}, as XLA_PYTHON_CLIENT_MEM_FRACTION={share} says"
    return f"{limit / GIB:.1f} GiB{whole}"


def what_fits(device: jax.Device) -> list[str]:
    """A table of what fits on one device, from measured figures."""
    from arcflow_jax.generate import memory_share
    from arcflow_jax.parallel.chips import GIB
    from arcflow_jax.parallel.fits import MEASURED, STREAMING, verdict

    limit, share = (device.memory_stats() or {}).get("bytes_limit"), memory_share(device)
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = [f"what fits into {limit / GIB:.1f} GiB, at 1024x1024"]
    for model, task, weights, gib in MEASURED:
        if task == STREAMING and device.platform == "cpu":
            continue  # it has one memory
        if device.platform == "cpu" and weights == "bf16":  # which it does not compute in
            weights, gib = "f32", 2 * gib
        lines.append(f"  {model:<19}{task:<36}{weights:<6}{gib:>5.1f} GiB  {verdict(gib * GIB, limit, share)}")
    return lines
