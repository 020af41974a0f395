"""The demo's report: one labelled image grid and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from arcflow_jax.demo.evaluate import Results
from arcflow_jax.demo.trajectory import Film
from arcflow_jax.storage.atomic import write_file
from arcflow_jax.training.report.log import read_losses

LABELS = {
    "teacher_50": "teacher, 50 steps",
    "teacher_4": "teacher, 4 steps",
    "teacher_2": "teacher, 2 steps",
    "arcflow_2": "ArcFlow, 2 steps",
}
COLOUR = "#c2410c"
COLUMNS = 10
CELL, GAP, LEFT, TOP = 128, 6, 190, 52  # pixels
FILMS = 5  # prompts whose trajectories are shown


def write(
    out: Path,
    metrics: dict[str, object],
    results: dict[str, Results],
    captions: Sequence[object],
    film: Film,
    log: Path,
) -> None:
    """Writes grid.png and index.html under `out`."""
    grid = draw_grid(results, captions)
    encoded = io.BytesIO()
    grid.save(encoded, "PNG", optimize=True)
    write_file(out / "grid.png", encoded.getvalue())
    page = Template(PAGE).substitute(
        grid=base64.b64encode(encoded.getvalue()).decode(),
        rows=table_rows(metrics),
        bars=bar_rows(metrics["bars"]),
        agreement=agreement_rows(metrics),
        **film_parts(film, captions),
        curve=curve(read_losses(log)),
        teacher=metrics["teacher"],
        prompts=metrics["prompts"],
        training_steps=metrics["training_steps"],
        date=metrics["date"],
        machine=html.escape(metrics["machine"]),
    )
    write_file(out / "index.html", page.encode())


def draw_grid(results: dict[str, Results], captions: Sequence[object]) -> Image.Image:
    """A row per sampler and a column per prompt: the first prompts of the list, not the best."""
    rows, columns = len(results), min(COLUMNS, len(captions))
    size = (LEFT + columns * (CELL + GAP), TOP + rows * (CELL + GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    small, large = ImageFont.load_default(11), ImageFont.load_default(15)
    for column, caption in enumerate(captions[:columns]):
        text = wrap(str(caption), 22)
        draw.text((LEFT + column * (CELL + GAP), 4), text, fill="black", font=small)
    for row, (name, result) in enumerate(results.items()):
        top = TOP + row * (CELL + GAP)
        draw.text((8, top + CELL // 2 - 8), LABELS[name], fill="black", font=large)
        pixels = np.concatenate(result.pixels[: -(-columns // len(result.pixels[0]))])[:columns]
        for column, image in enumerate(pixels):
            cell = Image.fromarray(image).resize((CELL, CELL), Image.Resampling.NEAREST)
            canvas.paste(cell, (LEFT + column * (CELL + GAP), top))
    return canvas


def wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def film_parts(film: Film, captions: Sequence[object]) -> dict[str, str]:
    """The slider's parts of the page: one image of all frames, a row of cells a sampler, and what the levels say.

    The image has a column for each noise level, and a row for each sampler and prompt.
    """
    count = min(FILMS, film.teacher.shape[1])
    frames = np.concatenate([film.teacher[:, :count], film.student[:, :count]], axis=1)  # [P, 2·count, H, W, 3]
    levels, rows, height, width, _ = frames.shape
    sheet = Image.fromarray(frames.transpose(1, 2, 0, 3, 4).reshape(rows * height, levels * width, 3))
    encoded = io.BytesIO()
    sheet.save(encoded, "JPEG", quality=88)
    cells = [f'<td><div class="frame" style="--row: {row}"></div></td>' for row in range(rows)]
    labels = (LABELS["teacher_50"], LABELS["arcflow_2"])
    table = [f"<th>{name}</th>{''.join(cells[i * count : (i + 1) * count])}" for i, name in enumerate(labels)]
    head = "".join(f"<th>{html.escape(str(caption))}</th>" for caption in captions[:count])
    distances = film.distance[:, :count].mean(1)
    said = [f"σ = {sigma:.2f}, distance {distance:.4f}" for sigma, distance in zip(film.sigmas, distances, strict=True)]
    return {
        "frames": base64.b64encode(encoded.getvalue()).decode(),
        "film_rows": f"<tr><th></th>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in table),
        "film_size": f"--levels: {levels}; --rows: {rows}; --level: {levels - 1}",
        "last": str(levels - 1),
        "said": json.dumps(said, ensure_ascii=False),
        "said_last": said[-1],
    }


def curve(losses: list[tuple[int, float]], width: int = 640, height: int = 220) -> str:
    """The training loss as an SVG, on a logarithmic scale."""
    steps, logs = [step for step, _ in losses], [np.log10(loss) for _, loss in losses]
    low, high = min(logs), max(logs) + 1e-9

    def point(step: int, loss: float) -> str:
        x = 50 + (width - 60) * step / max(steps)
        y = 10 + (height - 40) * (high - np.log10(loss)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    points = " ".join(point(*pair) for pair in losses)
    line = f'<polyline fill="none" stroke="{COLOUR}" stroke-width="2" points="{points}"/>'
    axis = (
        f'<text x="2" y="18">{10**high:.3g}</text><text x="2" y="{height - 30}">{10**low:.3g}</text>'
        f'<text x="50" y="{height - 8}">step 0</text><text x="{width - 40}" y="{height - 8}">{max(steps)}</text>'
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="training loss">{line}{axis}</svg>'


def table_rows(metrics: dict[str, object]) -> str:
    dense = metrics["teacher_50"]["denoise_seconds_per_image"]
    rows = []
    for name, label in LABELS.items():
        figure = metrics[name]
        cells = (
            f"{figure['endpoint_error']:.4f}",
            f"{figure['frechet_distance']:.2f}",
            f"{100 * figure['prompt_agreement']:.1f} %",
            f"{1000 * figure['denoise_seconds_per_image']:.2f}",
            f"{dense / figure['denoise_seconds_per_image']:.1f} ×",
            f"{1000 * figure['seconds_per_image']:.2f}",
            f"{metrics['teacher_50']['seconds_per_image'] / figure['seconds_per_image']:.1f} ×",
        )
        rows.append(f"<tr><th>{label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "".join(rows)


def agreement_rows(metrics: dict[str, object]) -> str:
    kinds = metrics["teacher_50"]["prompt_agreement_by_attribute"]
    head = "<tr><th></th>" + "".join(f"<th>{kind}</th>" for kind in kinds) + "</tr>"
    rows = [
        f"<tr><th>{label}</th>"
        + "".join(f"<td>{100 * metrics[name]['prompt_agreement_by_attribute'][kind]:.1f} %</td>" for kind in kinds)
        + "</tr>"
        for name, label in LABELS.items()
    ]
    return head + "".join(rows)


def bar_rows(bars: Sequence[dict[str, object]]) -> str:
    return "".join(
        f"<tr><th>{html.escape(bar['what'])}</th><td>{bar['value']:.3g}</td><td>{html.escape(bar['bar'])}</td>"
        f"<td>{'reached' if bar['reached'] else '<b>missed</b>'}</td></tr>"
        for bar in bars
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>ArcFlow in two steps</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1c1917; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e7e5e4; text-align: right; }
td { white-space: nowrap; }
th:first-child { text-align: left; font-weight: 600; }
img, svg { max-width: 100%; } svg { max-width: 640px; font: 12px system-ui, sans-serif; }
.note { color: #57534e; font-size: .9rem; }
.wide { overflow-x: auto; }
.film th { font-weight: 400; font-size: .8rem; text-align: left; width: 128px; }
.film tr:first-child { vertical-align: bottom; }
.film td, .film th { border: 0; padding: .2rem; }
.frame { width: 128px; height: 128px; image-rendering: pixelated; background-image: url(data:image/jpeg;base64,$frames);
  background-size: calc(100% * var(--levels)) calc(100% * var(--rows));
  background-position: calc(100% * var(--level) / (var(--levels) - 1)) calc(100% * var(--row) / (var(--rows) - 1)); }
.slider { display: flex; gap: 1rem; align-items: center; flex-wrap: wrap; }
.slider input { flex: 1 1 8rem; max-width: 40rem; accent-color: #c2410c; }
output { font-variant-numeric: tabular-nums; }
@media (max-width: 800px) { .frame { width: 64px; height: 64px; } .film th { width: 64px; } }
</style></head><body>
<h1>A teacher in 50 steps, its student in two</h1>
<p>Four samplers with the same prompts, and the same noise in each column: the bundled teacher $teacher in 50, 4 and 2
steps, and its student. The prompts are the first of the test list; none of them was used in training.</p>
<img alt="images of the four samplers" src="data:image/png;base64,$grid">
<h2>From noise to data</h2>
<p>The states on the way, decoded. The teacher is evaluated at each of its steps. The student is evaluated twice, and
its curves give the state at every noise level σ in closed form. Move the slider from noise to data.</p>
<div id="film" style="$film_size">
<div class="slider"><label for="level">noise</label><input id="level" type="range" min="0" max="$last" value="$last">
<span>data</span><output for="level">$said_last</output></div>
<div class="wide"><table class="film">$film_rows</table></div></div>
<p class="note">Distance: mean square distance between the two rows' latents, over these prompts.</p>
<h2>Figures over $prompts prompts</h2>
<div class="wide"><table><tr><th></th><th>endpoint error</th><th>Fréchet distance</th><th>prompt agreement</th>
<th>denoising, ms per image</th><th>speed-up</th><th>prompt to image, ms per image</th><th>speed-up</th></tr>
$rows</table></div>
<p class="note">Endpoint error: mean square distance to the teacher's 50-step latents from the same noise. Fréchet
distance: between a small classifier's features of these images and of true images of the same prompts. Prompt
agreement: share of the requested attributes that the classifier reads in the image. Times: median over batches of 16;
prompt to image includes text encoders and decoder.</p>
<h2>Targets of the demo</h2>
<div class="wide"><table><tr><th>ArcFlow in 2 steps</th><th>measured</th><th>target</th><th></th></tr>
$bars</table></div>
<h2>Prompt agreement by attribute</h2>
<div class="wide"><table>$agreement</table></div>
<h2>Training loss, $training_steps training steps</h2>
$curve
<p class="note">$date, $machine.</p>
<script>
const said = $said, film = document.getElementById("film"), level = document.getElementById("level");
level.addEventListener("input", () => {
  film.style.setProperty("--level", level.value);
  film.querySelector("output").textContent = said[level.value];
});
</script>
</body></html>
"""
