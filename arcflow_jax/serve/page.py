"""The page, by Gradio: images while the prompt is typed, teacher beside student, settings read back from a PNG."""

from __future__ import annotations

import asyncio
import dataclasses
import html
import random
import time
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from arcflow_jax.errors import UserError
from arcflow_jax.image_to_image import STRENGTH
from arcflow_jax.serve.api import LINKS
from arcflow_jax.serve.choices import SEED, Choice, Offer, negative_prompt, read_back
from arcflow_jax.serve.engine import Busy, Closed, Engine
from arcflow_jax.serve.images import Images
from arcflow_jax.serve.page_image import QUIET, reference_images, start_image
from arcflow_jax.serve.requests import Limits, order

KEPT = 12  # images of the gallery
UPLOAD = "16mb"
EXAMPLE = "a red fox in the snow"
EMPTY = '<p class="empty">The image appears here.</p>'
BUSY = '<figure><p class="empty" role="status">The teacher makes its image.</p></figure>'
# Gradio's own gray and orange have less than the 4.5:1 of WCAG 2
CONTRAST = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
}
STYLE = """
.gradio-container { max-width: 1200px !important; width: 100%; margin: 0 auto !important; }
#seed { align-items: center; }
.arcflow { display: flex; flex-wrap: wrap; gap: 12px; }
.arcflow figure { margin: 0; flex: 1 1 140px; min-width: 0; max-width: 512px; }
.arcflow img { width: 100%; border-radius: 8px; display: block; background: #8882; margin: 0; }
.arcflow figcaption { font-size: 14px; padding: 4px 0; }
.arcflow a { margin: 0; padding: 0; }
.arcflow.small figure { flex: 0 0 96px; }
.arcflow.small figcaption span { display: none; }
.arcflow .empty { flex: 1 1 140px; max-width: 512px; aspect-ratio: 1; margin: 0; border-radius: 8px; display: grid;
  place-items: center; background: #8882; }
.arcflow .error { color: #b00020; font-weight: 600; }
.dark .arcflow .error { color: #ff8a80; }
"""


def mount(app: FastAPI, engine: Engine, *, teacher: Engine | None, limits: Limits, images: Images) -> FastAPI:
    """The application with the page at /, behind its other routes."""
    # No other site may read anything; Gradio would let some in
    app.add_middleware(CORSMiddleware, allow_origins=[])
    # System fonts, so that a browser asks no other server
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(**CONTRAST)
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


@dataclasses.dataclass
class Session:
    """What the server knows of an open page.

    Attributes:
      latest: what was asked for last, and whether as a comparison. Only that is shown.
      shown, kept: figures, now and in the gallery.
    """

    latest: tuple[Choice, bool] | None = None
    shown: str = ""
    kept: list[str] = dataclasses.field(default_factory=list)


class Maker:
    """Makes an engine's images for the page."""

    def __init__(self, offer: Offer, limits: Limits, images: Images):
        self.offer, self.limits, self.images = offer, limits, images

    async def __call__(self, engine: Engine, choice: Choice, negative: str | None = None) -> str:
        """A figure with the image and its time, or with what was wrong."""
        begin = time.monotonic()
        try:
            asked = choice.generation(self.offer, negative)
            wanted = order(asked, engine.declared[0], self.limits, engine.check, *choice.given())
            (future,) = engine.submit(wanted.prompt, wanted.settings, wanted.seed, start=wanted.start)
        except (UserError, Busy, Closed) as error:
            return wrong(str(error))
        try:
            png = await asyncio.wait_for(asyncio.wrap_future(future), self.limits.seconds)
        except TimeoutError:
            return wrong(f"there was no image after {self.limits.seconds:g} s, try again")
        except UserError:  # as for the API
            return wrong("the device ran out of memory")
        except Exception:  # which the engine has logged
            return wrong("the server has an error; its log says more")
        took, link = time.monotonic() - begin, f"{LINKS.lstrip('/')}{self.images.keep(png)}.png"
        who = "teacher" if engine.pipeline.student is None else "student"
        return (
            f'<figure><img src="{link}" alt="{html.escape(choice.prompt)}"><figcaption>'
            f"<span>{who}, {wanted.settings.steps} steps, {took:.2f} s · </span>"
            f'<a href="{link}" download="{who}-seed{wanted.seed}.png">download</a></figcaption></figure>'
        )


def page(engine: Engine, teacher: Engine | None, limits: Limits, images: Images) -> gr.Blocks:
    """The page's parts, and what each of them does."""
    offer = Offer.of(engine)
    make = Maker(offer, limits, images)

    def chosen(*values: Any) -> Choice:
        return Choice(*values[: -len(offer.loras) or None], loras=values[len(values) - len(offer.loras) :])

    async def live(session: Session, *values: Any) -> Any:
        choice = chosen(*values)
        # A change can arrive after the comparison that has it
        if not choice.prompt.strip() or session.latest == (choice, True):
            return gr.skip()
        session.latest = mine = choice, False
        figure = await make(engine, choice)
        if session.latest != mine:
            return gr.skip()
        session.shown = figure
        return in_row(figure)

    async def compared(session: Session, *values: Any) -> AsyncGenerator[Any]:
        assert teacher is not None
        choice = chosen(*values)
        session.latest = mine = choice, True
        session.shown = await make(engine, choice)
        if session.latest == mine:
            yield in_row(session.shown + BUSY)
            published = dataclasses.replace(choice, steps=None)
            others = await make(teacher, published, negative_prompt(teacher.pipeline))
        if session.latest == mine:
            session.shown += others
            yield in_row(session.shown)

    def keep(session: Session) -> str:
        if "<img" in session.shown and session.shown not in session.kept[:1]:
            session.kept = [session.shown, *session.kept][:KEPT]
        return in_row("".join(session.kept), "small")

    def drop(file: str) -> list[Any]:
        try:
            found = read_back(file, offer, limits)
        except UserError as error:
            gr.Warning(str(error))
            return [None, *[gr.skip()] * (len(settings) - len(given))]
        for note in found.notes:
            gr.Warning(html.escape(note))
        values = [found.prompt, found.seed, found.size, found.steps, found.guidance, found.strength, *found.loras]
        return [None, *(gr.skip() if value is None else value for value in values)]

    with gr.Blocks(title=f"ArcFlow: {engine.name}", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        session, start, references = gr.State(Session()), gr.State(None), gr.State(None)
        gr.Markdown(f"# ArcFlow\n{engine.name}: type, and the image follows.")
        prompt = gr.Textbox(label="Prompt", placeholder=EXAMPLE, lines=1, max_lines=4, autofocus=True)
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                shown = gr.HTML(in_row(EMPTY))
                with gr.Row():
                    keeps = gr.Button("Keep", variant="primary", min_width=120)
                    compares = gr.Button("Compare", visible=teacher is not None, min_width=120)
                gallery = gr.HTML(in_row("", "small"))
            with gr.Column(scale=2, min_width=300):
                with gr.Row(elem_id="seed"):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEED, min_width=120)
                    other = gr.Button("Another seed", min_width=120)
                with gr.Row():
                    size = dropdown("Size", offer.sizes, offer.sizes[0])
                    count = dropdown("Steps", offer.steps, engine.declared[0].steps)
                own, most = offer.guidance or (0.0, 1.0)
                scale = gr.Slider(0, most, own, step=0.01, label="Guidance", visible=offer.guidance is not None)
                loras = lora_sliders(offer)
                with gr.Accordion("Reference images", open=False, visible=bool(offer.references)):
                    if offer.references:
                        reference_images(offer.sizes, offer.references, references)
                with gr.Accordion("Start from an image", open=False, visible=offer.edits):
                    if offer.edits:
                        start_image(offer.sizes, size, start)
                    strength = gr.Slider(
                        0.01, 1, STRENGTH, step=0.01, label="Strength", info="How much of the image is made anew"
                    )
                file = gr.File(label="Settings of a PNG: drop it here", file_types=[".png"], height=140)
        given = [start, references]
        settings = [prompt, seed, size, count, scale, strength, *given, *loras]
        # While an image is made, only the newest change waits: the latest text wins. `input` would miss a pasted text
        gr.on(
            [each.change for each in settings],
            live,
            [session, *settings],
            shown,
            trigger_mode="always_last",
            concurrency_limit=None,
            **QUIET,
        )
        other.click(lambda: random.randrange(2**32), None, seed, **QUIET)
        gr.on([keeps.click, prompt.submit], keep, session, gallery, **QUIET)
        file.upload(drop, file, [file, *(each for each in settings if each not in given)], **QUIET)
        if teacher is not None:
            compares.click(compared, [session, *settings], shown, concurrency_limit=None, **QUIET)
    return blocks.queue(max_size=64, api_open=False)


def dropdown(label: str, choices: tuple[Any, ...], value: Any) -> gr.Dropdown:
    return gr.Dropdown(list(choices), value=value, label=label, filterable=False, min_width=120)


def lora_sliders(offer: Offer) -> list[gr.Slider]:
    """A strength for each style LoRA."""
    if not offer.loras:
        return []
    with gr.Accordion("Style LoRAs", open=True):
        return [
            gr.Slider(*offer.strengths(name), strength, step=0.01, label=name, info="Strength, 0 is off")
            for name, strength in offer.loras.items()
        ]


def wrong(text: str) -> str:
    return f'<p class="error" role="alert">{html.escape(text[:1].upper() + text[1:])}</p>'


def in_row(figures: str, kind: str = "large") -> str:
    return f'<div class="arcflow {kind}">{figures}</div>'
