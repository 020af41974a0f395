"""`arcflow warm`."""

from __future__ import annotations

import collections
import itertools
import time
from typing import Annotated, Any

import typer

from arcflow_jax.cli import options
from arcflow_jax.errors import UserError


@options.expand_options
def warm(
    sizes: Annotated[
        str,
        typer.Option(help="Width x height in pixels, e.g. 1024x1024,768x1344. By default the model's."),
    ] = "",
    references: Annotated[
        int,
        typer.Option(min=0, help="Compile for this many reference images, each of the size of the image made."),
    ] = 0,
    *,
    sampling: options.SamplingOptions,
) -> None:
    """Compiles the programs that sampling from a model needs, for each size, into the cache.

    Programs are kept for the same machine, versions, batch size and steps. With --batch-size, the smaller batches that
    arcflow serve makes are compiled as well. Each size is sampled once for each batch size, and no image is written.
    """
    if sizes and (sampling.height or sampling.width):
        raise UserError("--height and --width are one size, --sizes may be several: leave one or the other out")
    import jax
    from PIL import Image

    from arcflow_jax.references import reference_sets
    from arcflow_jax.sampling_settings import batch_for, batch_sizes, sides
    from arcflow_jax.storage import cache

    shapes = [sides(size) for size in filter(None, sizes.split(","))] or [(sampling.width, sampling.height)]
    cache.enable_compilation_cache()
    # Small programs too: dozens of them take longer to compile than to read
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
    pipeline = sampling.load()
    batches = batch_sizes(pipeline.mesh, batch_for(pipeline.mesh, sampling.batch_size))
    calls: list[dict[str, Any]] = [sampling.settings() | {"height": height, "width": width} for width, height in shapes]
    described = [pipeline.described(**settings) for settings in calls]  # all are checked before the first compiles
    if references:
        for settings, made in zip(calls, described, strict=True):
            settings["image"] = [Image.new("RGB", (int(made["width"]), int(made["height"])))] * references
            reference_sets(pipeline.directory, settings["image"], 1, 1, settings)  # raises if they cannot be used
    for batch, (settings, image) in itertools.product(batches, zip(calls, described, strict=True)):
        started = time.perf_counter()
        for _ in pipeline.stream(["warm"] * batch, batch_size=batch, **settings):
            pass
        seconds = time.perf_counter() - started
        print(f"{image['width']}x{image['height']}, {batch} a batch, {image['steps']} steps: {seconds:.1f} s")
    print(f"{events['cache_misses']} programs compiled, {events['cache_hits']} found in the cache")
