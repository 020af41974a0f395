"""`arcflow serve`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import Annotated

import typer

from arcflow_jax.cli import options
from arcflow_jax.errors import UserError


@options.expand_options
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on. The default is for this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="ARCFLOW_API_KEY",
            show_envvar=False,
            help="Key that clients have to show. Better set the environment variable ARCFLOW_API_KEY: other users of a "
            "machine see its command lines.",
        ),
    ] = None,
    sizes: Annotated[
        str,
        typer.Option(help="Sizes that are served, width x height, e.g. 1024x1024,768x1344. By default the model's."),
    ] = "",
    steps: Annotated[
        str, typer.Option(help="NFEs that are served, e.g. 2,4. By default what the student was trained for.")
    ] = "",
    compile_on_request: Annotated[
        bool,
        typer.Option(
            "--compile-on-request", help="Compile other sizes and NFEs when they are asked for, while others wait."
        ),
    ] = False,
    edits: Annotated[
        bool,
        typer.Option(
            "--edits", help="Serve /v1/images/edits: for each size and NFE, compile image to image and inpainting too."
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Most images of a batch.")] = 4,
    wait_ms: Annotated[int, typer.Option(min=0, help="Milliseconds that an image waits for others of its batch.")] = 10,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait. More are refused, with status 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until a request fails with status 504.")] = 120,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that waiting requests have after SIGTERM.")] = 30,
    replicas: Annotated[
        int, typer.Option(min=1, help="Copies of the model, each on its part of the devices, with a mesh of its own.")
    ] = 1,
    max_images: Annotated[int, typer.Option(min=1, help="Most images of a request.")] = 8,
    max_steps: Annotated[int, typer.Option(min=1, help="Largest NFE of a request.")] = 100,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of an image.")] = 2048 * 2048,
    max_prompt: Annotated[int, typer.Option(min=1, help="Most characters of a prompt.")] = 4000,
    link_seconds: Annotated[
        int, typer.Option(min=1, help="Seconds that the links of response_format url last.")
    ] = 3600,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Show a page at / to make images with.")] = True,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Load the teacher as well: the page can show its image and time beside the student's."
        ),
    ] = False,
    *,
    loading: options.LoadingOptions,
) -> None:
    """Serves images over HTTP: a page, and OpenAI's API.

    On SIGTERM it finishes what waits, within the grace time, and exits with 0.
    """
    from arcflow_jax.data.prompts import library

    for name in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", *(["gradio"] if page else [])):
        library(name, "arcflow serve and its clients", extra="serve")
    import jax

    from arcflow_jax.parallel.mesh import parse_mesh
    from arcflow_jax.sampling_settings import batch_for, sides
    from arcflow_jax.serve import api, requests, server
    from arcflow_jax.serve.choices import comparison
    from arcflow_jax.serve.engine import Engine
    from arcflow_jax.serve.images import Images
    from arcflow_jax.serve.metrics import Metrics
    from arcflow_jax.serve.settings import declared

    if api_key is not None and not api_key.strip():
        raise UserError("the API key is empty: leave it out, or choose a long one")
    if compare and (loading.teacher or not page):
        superfluous = "--teacher" if loading.teacher else "--no-page"
        raise UserError(f"--compare shows a teacher beside its student on the page: leave {superfluous} out")
    asked_sizes = [sides(size) for size in filter(None, sizes.split(","))]
    asked_steps = requests.numbers(steps)
    devices = jax.local_devices()
    share = len(devices) // replicas
    if not share:
        raise UserError(f"--replicas is {replicas}, but may be at most {len(devices)}, the number of devices")
    meshes = [parse_mesh(loading.mesh, devices[i * share : (i + 1) * share]) for i in range(replicas)]
    pipelines = [loading.load(mesh) for mesh in meshes]
    metrics = Metrics(batch_size)
    common = {"capacity": queue, "on_request": compile_on_request, "wait": wait_ms / 1000}
    settings = declared(pipelines[0], asked_sizes, asked_steps, edits)
    limits = requests.Limits(min(max_images, queue), max_prompt, max_steps, max_pixels, timeout)
    limits.check_served(settings)
    engine = Engine(pipelines, batch_size=batch_size, declared=settings, metrics=metrics, **common)
    teacher = None
    if compare:
        of_teacher = dataclasses.replace(loading, adapter=None, adapter_scale=1.0, raw=False, merge=None, teacher=True)
        loaded = of_teacher.load(meshes[0])
        settings = comparison(loaded, list(dict.fromkeys((each.width, each.height) for each in settings)), edits)
        limits.check_served(settings)
        alone = batch_for(loaded.mesh, None)
        teacher = Engine([loaded], batch_size=alone, declared=settings, metrics=Metrics(alone), **common)

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("arcflow.serve").setLevel(logging.INFO)
    images = Images(link_seconds)
    app = api.build(engine, limits=limits, images=images)
    if page:
        from arcflow_jax.serve.page import mount

        app = mount(app, engine, teacher=teacher, limits=limits, images=images)
    door = api.Door(app, api_key, metrics)
    engines = [engine, *([] if teacher is None else [teacher])]
    if not server.serve(door, engines, host=host, port=port, grace=grace):
        print("the grace time is over: some requests got no image", file=sys.stderr)
        sys.exit(1)
