"""Two processes that do not see the same: both are told in the first seconds."""

from __future__ import annotations

import textwrap
import time

import pytest
from PIL import Image

from tests.helpers.processes import finish, free_address, start
from tests.helpers.tiny_run import PROMPTS

TRAINING = """
    import os, sys
    from pathlib import Path
    from arcflow_jax.errors import report_errors
    from arcflow_jax.parallel.processes import initialize
    from arcflow_jax.parallel import together
    from arcflow_jax.training.loop import train
    from tests.helpers.tiny_run import recipe
    address, process, model, host, prompts, seed = sys.argv[1:]
    os.chdir(host)
    together.PATIENCE = 2
    with report_errors():
        initialize(address, 2, int(process))
        made = {"prompts": prompts, "mesh": (2, 1, 1, 1), "batch": 2, "seed": int(seed)}
        train(recipe(Path(model), Path("run"), **made))
"""

LISTING = """
    import os, sys
    from pathlib import Path
    from arcflow_jax.data import images
    from arcflow_jax.errors import UserError
    from arcflow_jax.parallel.processes import initialize
    from arcflow_jax.training.plan import Plan
    from tests.helpers.tiny_run import recipe
    address, process, model, host = sys.argv[1:]
    os.chdir(host)
    listed, list_folder = [], images.from_text_files
    images.from_text_files = lambda folder: listed.append(folder) or list_folder(folder)
    initialize(address, 2, int(process))
    plan = Plan.make(recipe(Path(model), Path("run"), images="images", mesh=(2, 1, 1, 1), batch=2))
    print("listed", len(listed), [(str(image.file), image.caption) for image in plan.images])
    for image in plan.images:
        try:
            images.pixels(image.file, 8, 8)
        except UserError as error:
            print("error:", error)
"""


def test_a_folder_of_images_is_listed_by_the_first_process_alone(tiny_flux, tmp_path):
    """The second has images of its own, without captions; it lacks one."""
    address, running = free_address(), []
    for i in (0, 1):
        host = tmp_path / f"host-{i}"
        (host / "images").mkdir(parents=True)
        for number, prompt in enumerate(PROMPTS[: 4 - i]):
            Image.new("RGB", (8, 8)).save(host / "images" / f"{number}.png")
            if i == 0:
                (host / "images" / f"{number}.txt").write_text(prompt)
        running.append(start(1, "-c", textwrap.dedent(LISTING), address, i, tiny_flux, host))
    first, second = ([line for line in finish(x).splitlines() if line[:5] in ("liste", "error")] for x in running)
    images = [(f"images/{number}.png", prompt) for number, prompt in enumerate(PROMPTS)]
    assert first == [f"listed 1 {images}"]
    assert second == [f"listed 0 {images}", "error: images/3.png is missing"]


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        ("disk", "is not the same directory on all hosts: process 1 cannot see what process 0 writes there; name a"),
        ("prompts", "the prompts, of which the first process has 4, differ on process 1: all hosts have to start"),
        ("seed", "the settings of the recipe differ on process 1: all hosts have to start from the same"),
    ],
)
def test_hosts_that_see_other_things_are_refused(tiny_flux, tmp_path, differs, message):
    for i, prompts in enumerate((PROMPTS, PROMPTS[::-1])):
        (tmp_path / f"{i}.txt").write_text("\n".join(prompts))
    address, began, running = free_address(), time.monotonic(), []
    for i in (0, 1):
        host = tmp_path / (f"host-{i}" if differs == "disk" else "shared")  # where both have the path "run"
        host.mkdir(exist_ok=True)
        prompts = tmp_path / f"{i if differs == 'prompts' else 0}.txt"
        seed = i if differs == "seed" else 0
        running.append(start(1, "-c", textwrap.dedent(TRAINING), address, i, tiny_flux, host, prompts, seed))
    for process in running:
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 2, error
        assert message in error
    assert time.monotonic() - began < 60
