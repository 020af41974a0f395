"""The page, by Gradio: images while the prompt is typed, teacher beside student, settings read back from a PNG."""

from __future__ import annotations

import asyncio
import html
import random
import time
from typing import Any

import gradio as gr
from fastapi import FastAPI
from PIL import Image
from starlette.middleware.cors import CORSMiddleware

from arcflow_jax.errors import UserError
from arcflow_jax.families.family import takes_guidance
from arcflow_jax.serve.api import LINKS
from arcflow_jax.serve.engine import Busy, Closed, Engine
from arcflow_jax.serve.images import Images
from arcflow_jax.serve.requests import Generation, Limits, order

KEPT = 12  # images of the gallery
UPLOAD = "16mb"
EXAMPLE = "a red fox in the snow"
STYLE = """
.gradio-container { max-width: 1200px !important; }
.arcflow { display: flex; flex-wrap: wrap; gap: 12px; }
.arcflow figure { margin: 0; flex: 1 1 220px; min-width: 0; max-width: 512px; }
.arcflow img { width: 100%; border-radius: 8px; image-rendering: auto; display: block; background: #8882; }
.arcflow figcaption { font-size: 14px; padding: 4px 0; }
.arcflow.small figure { flex: 0 0 96px; }
.arcflow.small figcaption { display: none; }
.arcflow .error { color: #b00020; font-weight: 600; }
/* On a phone the image comes before the settings */
@media (max-width: 640px) { #below { flex-direction: column-reverse; } }
.dark .arcflow .error { color: #ff8a80; }
"""


def mount(app: FastAPI, engine: Engine, *, teacher: Engine | None, limits: Limits, images: Images) -> FastAPI:
    """The application with the page at /, behind its other routes."""
    # No other site may read anything; Gradio would let some in
    app.add_middleware(CORSMiddleware, allow_origins=[])
    # System fonts, so that a browser asks no other server
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return gr.mount_gradio_app(
        app,
        page(engine, teacher, limits, images),
        "/",
        css=STYLE,
        theme=theme,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        max_file_size=UPLOAD,
    )


def page(engine: Engine, teacher: Engine | None, limits: Limits, images: Images) -> gr.Blocks:
    """The page's parts, and what each of them does."""
    default = engine.declared[0]
    sizes = list(dict.fromkeys(f"{each.width}x{each.height}" for each in engine.declared))
    steps = sorted({each.steps for each in engine.declared})
    pipe = engine.pipeline
    own = pipe.settings(**default.arguments()).guidance
    guided = takes_guidance(pipe.directory.config("transformer"))

    async def make(maker: Engine, prompt: str, seed: float, size: str, count: int | None, scale: float) -> str:
        """A figure with the image and its time, or with what was wrong."""
        start = time.monotonic()
        given = {"guidance": float(scale)} if guided else {} if maker is engine else {"negative_prompt": ""}
        try:
            asked = Generation(prompt=prompt, seed=int(seed or 0), size=size, steps=count, **given)
            wanted = order(asked, maker.declared[0], limits, maker.check)
            (future,) = maker.submit(wanted.prompt, wanted.settings, wanted.seed)
            png = await asyncio.wait_for(asyncio.wrap_future(future), limits.seconds)
        except (UserError, Busy, Closed, TimeoutError) as error:
            return f'<p class="error">{html.escape(str(error) or "it took too long")}</p>'
        took, link = time.monotonic() - start, f"{LINKS.lstrip('/')}{images.keep(png)}.png"
        who = "teacher" if maker.pipeline.student is None else "student"
        caption = f"{who}, {wanted.settings.steps} steps, {took:.2f} s"
        target = f'href="{link}" download="{who}-seed{wanted.seed}.png"'
        return (
            f'<figure><a {target}><img src="{link}" alt="{html.escape(prompt)}"></a>'
            f"<figcaption>{caption} · <a {target}>download</a></figcaption></figure>"
        )

    async def live(prompt: str, *settings: Any) -> Any:
        if not prompt.strip():
            return gr.skip(), gr.skip()
        figure = await make(engine, prompt, *settings)
        return in_row(figure), figure

    async def compared(prompt: str, seed: float, size: str, count: int, scale: float) -> tuple[str, str]:
        assert teacher is not None
        figures = await make(engine, prompt, seed, size, count, scale)
        figures += await make(teacher, prompt, seed, size, None, scale)
        return in_row(figures), figures

    def keep(figures: str, kept: list[str]) -> tuple[list[str], str]:
        kept = [figures, *kept][:KEPT] if "<img" in figures else kept
        return kept, in_row("".join(kept), "small")

    def read_back(file: str | None) -> list[Any]:
        """The prompt and settings of a PNG that the page or `arcflow sample` has made."""
        try:
            with Image.open(file or "", formats=["PNG"]) as opened:
                info, size = dict(opened.info), f"{opened.width}x{opened.height}"
            found = [str(info["prompt"])[: limits.prompt], int(info["seed"]), size, int(info["steps"])]
            scale, number = float(info.get("guidance", own)), int(info.get("image", 0))
        except (OSError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError):
            gr.Warning("This file has no settings in it: drop a PNG that was made here.")
            return [gr.skip()] * 5
        if number:
            gr.Warning(f"It is image {number} of its seed; the page makes image 0.")
        for name, value, choices in (("size", size, sizes), ("steps", found[3], steps)):
            if value not in choices:
                gr.Warning(f"Its {name} {value} is not served; the page keeps its own.")
        return [
            *found[:2],
            size if size in sizes else gr.skip(),
            found[3] if found[3] in steps else gr.skip(),
            scale,
        ]

    with gr.Blocks(title=f"ArcFlow: {engine.name}", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# ArcFlow\n{engine.name}: type, and the image follows.")
        prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLE, lines=2, autofocus=True)
        with gr.Row(elem_id="below"):
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, min_width=120)
                    other = gr.Button("Another seed", min_width=120)
                with gr.Row():
                    size = gr.Dropdown(sizes, value=sizes[0], label="Size", min_width=120)
                    count = gr.Dropdown(steps, value=default.steps, label="Steps", min_width=80)
                scale = gr.Slider(0, 10, own, step=0.1, label="Guidance", visible=guided)
                with gr.Row():
                    keeps = gr.Button("Keep", variant="primary", min_width=120)
                    compares = gr.Button("Compare", visible=teacher is not None, min_width=120)
                file = gr.File(label="Settings of a PNG: drop it here", file_types=[".png"], height=140)
            with gr.Column(scale=3, min_width=300):
                shown = gr.HTML(in_row(""), label="Image", show_label=False)
                current, kept, gallery = gr.State(""), gr.State([]), gr.HTML(in_row("", "small"))
        settings = [prompt, seed, size, count, scale]
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        # While an image is made, only the newest change waits: the latest text wins. `input` would miss a pasted text
        gr.on(
            [each.change for each in settings],
            live,
            settings,
            [shown, current],
            trigger_mode="always_last",
            concurrency_limit=None,
            **hidden,
        )
        other.click(lambda: random.randrange(2**32), None, seed, **hidden)
        gr.on([keeps.click, prompt.submit], keep, [current, kept], [kept, gallery], **hidden)
        file.upload(read_back, file, settings, **hidden)
        if teacher is not None:
            compares.click(compared, settings, [shown, current], concurrency_limit=None, **hidden)
    return blocks.queue(max_size=64, api_open=False)


def in_row(figures: str, kind: str = "large") -> str:
    return f'<div class="arcflow {kind}">{figures}</div>'
