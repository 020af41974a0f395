"""Two processes that do not see the same: both are told before anything is trained."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image

from tests.helpers.processes import free_address, start
from tests.helpers.tiny_run import PROMPTS

TRAINING = """
    import os, sys
    from pathlib import Path
    from arcflow_jax.errors import report_errors
    from arcflow_jax.parallel.processes import initialize
    from arcflow_jax.parallel import together
    from arcflow_jax.training.loop import train
    from tests.helpers.tiny_run import recipe
    address, process, model, host = sys.argv[1:]
    os.chdir(host)
    together.PATIENCE = 2
    with report_errors():
        initialize(address, 2, int(process))
        train(recipe(Path(model), Path("run"), mesh=(2, 1, 1, 1), batch=2))
"""

PLANNING = """
    import os, sys
    from pathlib import Path
    from arcflow_jax.data import images
    from arcflow_jax.errors import UserError
    from arcflow_jax.parallel.processes import initialize
    from arcflow_jax.training.plan import check_plan
    from arcflow_jax.training.plan import Plan
    from tests.helpers.tiny_run import PROMPTS, recipe
    from arcflow_jax.models.model_cache import converted
    from arcflow_jax.demo import ASSETS
    address, process, model, host = sys.argv[1:]
    os.chdir(host)
    def plan(**changes):
        return Plan.make(recipe(Path(model), Path("run"), mesh=(2, 1, 1, 1), batch=2, **changes))
    def told(function, *arguments):
        try:
            function(*arguments)
        except UserError as error:
            print("error:", error)
    listed, list_folder = [], images.from_text_files
    images.from_text_files = lambda folder: listed.append(folder) or list_folder(folder)
    initialize(address, 2, int(process))
    with_images = plan(images="images")
    print("listed", len(listed), [(str(image.files[0]), image.caption) for image in with_images.images])
    for image in with_images.images:
        told(images.pixels, image.files[0], 8, 8)
    check_plan(plan())
    Path("other.txt").write_text("\\n".join(PROMPTS[::-1] if process == "1" else PROMPTS))
    told(check_plan, plan(prompts="other.txt"))
    told(check_plan, plan(seed=int(process)))
    os.environ["ARCFLOW_CACHE"] = str(Path.cwd().parent / "cache")  # which both share
    print("converted", converted(ASSETS / "tiny-flux"))
"""


def on_two_hosts(script: str, code: int, model: Path, folder: Path) -> list[list[str]]:
    """What two processes print, or say on stderr, that have directories of their own; by lines."""
    address = free_address()
    running = [start(1, "-c", textwrap.dedent(script), address, i, model, folder / f"host-{i}") for i in (0, 1)]
    found = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [code] * 2, found
    return [[*out.splitlines(), *err.splitlines()] for out, err in found]


def test_what_two_hosts_plan(tiny_flux, tmp_path):
    """The first alone lists the images; the second has a folder of its own, which lacks one. Both see a difference.

    One converts a model into the cache, and both use it.
    """
    for i in (0, 1):
        folder = tmp_path / f"host-{i}" / "images"
        folder.mkdir(parents=True)
        for number, prompt in enumerate(PROMPTS[: 4 - i]):
            Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
            if i == 0:
                (folder / f"{number}.txt").write_text(prompt)
    lines = on_two_hosts(PLANNING, 0, tiny_flux, tmp_path)
    first, second = ([line for line in each if line.startswith(("listed", "error:", "converted"))] for each in lines)
    images = [(f"images/{number}.png", prompt) for number, prompt in enumerate(PROMPTS)]
    differences = [
        f"error: {what} on process 1: all hosts have to start from the same"
        for what in ("the prompts, of which the first process has 4, differ", "the settings of the recipe differ")
    ]
    (model,) = (tmp_path / "cache" / "models").glob("*/model.json")
    ends = [*differences, f"converted {model.parent}"]
    assert first == [f"listed 1 {images}", *ends]
    assert second == [f"listed 0 {images}", "error: images/3.png is missing", *ends]


def test_a_directory_that_is_not_shared_is_refused(tiny_flux, tmp_path):
    for i in (0, 1):
        (tmp_path / f"host-{i}").mkdir()
    told = (
        "error: run is not the same directory on all hosts: process 1 cannot see what process 0 writes there; name a "
        "directory on a shared disk or in a bucket"
    )
    for lines in on_two_hosts(TRAINING, 2, tiny_flux, tmp_path):
        assert any(line.startswith(told) for line in lines), lines
