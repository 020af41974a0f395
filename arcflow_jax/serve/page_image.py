"""The page's parts for images: to start from, with a canvas to paint what is made anew, and reference images."""

from __future__ import annotations

import base64
import io
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from arcflow_jax.data.images import SUFFIXES
from arcflow_jax.errors import UserError
from arcflow_jax.sampling_settings import sides
from arcflow_jax.serve.start_image import References, StartImage, open_image, open_references, read_mask

QUIET = {"api_visibility": "private", "show_progress": "hidden"}
PREVIEW = 90  # JPEG's quality
HINT = "Paint what is made anew. Nothing painted: all of it."
CANVAS = f"""
<p>{HINT}</p>
<div><canvas role="img" aria-label="{HINT}"></canvas></div>
<button type="button">Clear the mask</button>
"""
CANVAS_STYLE = """
div { background-size: 100% 100%; border-radius: 8px; overflow: hidden; max-width: 512px; }
canvas { display: block; width: 100%; opacity: 0.7; cursor: crosshair; touch-action: none; }
button { padding: 4px 12px; border-radius: 8px; margin-top: 8px; }
"""
# gr.ImageEditor tells of a stroke when the next one ends, and uploads without end
PAINTING = """
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
let last = null;
const tell = value => { props.value = value; trigger("input"); };
const begin = () => {
  [canvas.width, canvas.height] = props.size;
  canvas.parentElement.style.backgroundImage = `url(${props.photo})`;
};
const line = event => {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const next = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  pen.lineWidth = canvas.width / 10;
  pen.lineCap = "round";
  pen.strokeStyle = "#f0f";
  pen.beginPath();
  pen.moveTo(...(last || next));
  pen.lineTo(...next);
  pen.stroke();
  last = next;
};
canvas.onpointerdown = event => { canvas.setPointerCapture(event.pointerId); line(event); };
canvas.onpointermove = event => { if (last) line(event); };
canvas.onpointerup = canvas.onpointercancel = () => { if (last) { last = null; tell(canvas.toDataURL()); } };
element.querySelector("button").onclick = () => { pen.clearRect(0, 0, canvas.width, canvas.height); tell(""); };
watch("photo", begin);
begin();
"""


def start_image(sizes: tuple[str, ...], size: gr.Dropdown, start: gr.State) -> None:
    """A place for an image to start from, which goes into `start`. A canvas then takes its place."""

    def opened(path: str, size: str) -> tuple[Any, ...]:
        try:
            image = open_image(path, sizes)
        except UserError as error:
            gr.Warning(str(error))
            return gr.skip(), gr.File(value=None), gr.skip(), gr.skip()
        return image, gr.File(value=None, visible=False), canvas(image, size), gr.Button(visible=True)

    def painted(drawing: str, image: StartImage | None) -> Any:
        if image is None:
            return gr.skip()
        return image.painted(read_mask(drawing, most)) if drawing else StartImage(image.fitted)

    def refitted(image: StartImage | None, size: str) -> tuple[Any, Any]:
        return (gr.skip(), gr.skip()) if image is None else (StartImage(image.fitted), canvas(image, size))

    def removed() -> tuple[Any, ...]:
        return None, gr.File(visible=True), gr.HTML(visible=False), gr.Button(visible=False)

    most = max(width * height for width, height in map(sides, sizes))
    file = gr.File(label="Image: drop it here", file_types=list(SUFFIXES), height=140)
    mask = gr.HTML(
        "",
        html_template=CANVAS,
        css_template=CANVAS_STYLE,
        js_on_load=PAINTING,
        visible=False,
        photo="",
        size=[1, 1],
    )
    remove = gr.Button("Remove the image", visible=False)
    file.upload(opened, [file, size], [start, file, mask, remove], **QUIET)
    mask.input(painted, [mask, start], start, trigger_mode="always_last", **QUIET)
    remove.click(removed, None, [start, file, mask, remove], **QUIET)
    size.change(refitted, [start, size], [start, mask], **QUIET)


def canvas(image: StartImage, size: str) -> gr.HTML:
    """A canvas on the image in a size, nothing painted."""
    pixels = image.fitted[size].pixels
    return gr.HTML("", visible=True, photo=preview(pixels), size=[pixels.shape[1], pixels.shape[0]])


def reference_images(sizes: tuple[str, ...], most: int, references: gr.State) -> None:
    """A place for up to `most` reference images, which go into `references`, and a row that shows them."""

    def opened(paths: list[str] | None) -> tuple[Any, ...]:
        try:
            images = open_references(paths, sizes, most) if paths else None
        except UserError as error:
            gr.Warning(str(error))
            return None, gr.File(value=None), gr.HTML(visible=False)
        return images, gr.skip(), row(images)

    label = "Reference image: drop it here" if most == 1 else f"Reference images: drop up to {most} here"
    file = gr.File(label=label, file_types=list(SUFFIXES), file_count="multiple", height=140)
    shown = gr.HTML(visible=False)
    gr.on([file.upload, file.delete, file.clear], opened, file, [references, file, shown], **QUIET)


def row(images: References | None) -> gr.HTML:
    """Small figures of reference images, in their order."""
    if images is None:
        return gr.HTML(visible=False)
    figures = [
        f'<figure><img src="{preview(pixels)}" alt="Reference image {number}"></figure>'
        for number, pixels in enumerate(next(iter(images.fitted.values())).pixels, start=1)
    ]
    return gr.HTML(f'<div class="arcflow small">{"".join(figures)}</div>', visible=True)


def preview(pixels: np.ndarray) -> str:
    """An image [H, W, 3] as a data URL."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=PREVIEW)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
