"""Commands that share their prompts among several processes: two make, bit for bit, what one makes."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from arcflow_jax.data.embeddings import read_description
from tests.helpers.processes import finish, free_address, start
from tests.helpers.random_student import write_adapter
from tests.helpers.tiny_run import PROMPTS

COMMANDS = """
    import sys
    import numpy as np
    from arcflow_jax.cli.app import main
    from arcflow_jax.evaluate import measures, statistics
    from arcflow_jax.training import embeddings

    class FakeInception:
        sha256, published = "0" * 64, False
        def __init__(self, file):
            pass
        def __call__(self, images):
            return images.reshape(len(images), -1)[:, ::7919].astype(np.float32)

    class FakeNetwork:
        def __init__(self, source):
            pass
        def images(self, images):
            return np.stack([np.asarray(image.resize((4, 4)), np.float32).ravel() + 1 for image in images])
        def prompts(self, prompts):
            return np.stack([np.random.default_rng(len(prompt)).random(48, np.float32) for prompt in prompts])

    measures.Inception, measures.Clip, measures.image_network = FakeInception, FakeNetwork, FakeNetwork
    statistics.BATCH, embeddings.SHARD = 2, 2
    folder, model, student, out, *several = sys.argv[1:]
    size = ["--height", "32", "--width", "32", "--model", model]
    made = [*size, "--adapter", student, "--batch-size", "2"]
    prompts = ["--prompts", f"{folder}/prompts.txt"]
    for command in [
        ["sample", "--prompts-file", f"{folder}/prompts.txt", "--grid", "--out", f"{out}/images", *made],
        ["evaluate", "trajectory", *prompts, "--teacher-steps", "4", "--out", f"{out}/trajectory", *made],
        ["evaluate", "metrics", *prompts, "--metric", "fid", "--out", f"{out}/figures.json", *made],
        ["evaluate", "metrics", *prompts, "--metric", "retrieval", "--metric", "diversity", "--images-per-prompt", "3",
         "--out", f"{out}/diversity.json", *made],
        ["evaluate", "export", "--benchmark", "geneval", "--prompts", f"{folder}/geneval.jsonl",
         "--images", "1", "--out", f"{out}/geneval", *made],
        ["embed-prompts", "--config", "tiny", f"--config.model={model}", "--config.batch=2",
         f"--config.prompts={folder}/prompts.txt", "--out", f"{out}/embeddings"],
    ]:
        try:
            main([*command, *several])
        except SystemExit as end:
            assert not end.code, command
        several = []  # they are connected
"""


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tiny_flux, tmp_path):
    prompts = [*PROMPTS, "a small white ring"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    records = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (tmp_path / "geneval.jsonl").write_text("".join(records))
    student, address = write_adapter(tiny_flux, tmp_path / "student", seed=0), free_address()
    alone = start(1, "-c", textwrap.dedent(COMMANDS), tmp_path, tiny_flux, student, tmp_path / "one")
    running = []
    for i in (0, 1):
        several = ("--coordinator", address, "--processes", 2, "--process-id", i)
        running.append(
            start(1, "-c", textwrap.dedent(COMMANDS), tmp_path, tiny_flux, student, tmp_path / "two", *several)
        )
    said, (first, second) = finish(alone), map(finish, running)
    expected, found = files(tmp_path / "one"), files(tmp_path / "two")
    assert found.keys() == expected.keys()
    assert [name for name, content in found.items() if content != expected[name]] == []
    assert len([name for name in found if name.startswith("images/")]) == len(prompts) + 1

    def images(text: str) -> list[str]:
        return [Path(line).name for line in text.splitlines() if line.endswith(".png")]

    assert [image[:4] for image in images(said)] == ["0000", "0001", "0002", "0003", "0004", "grid"]
    assert [image[:4] for image in images(first)] == ["0000", "0001", "grid"]
    assert [image[:4] for image in images(second)] == ["0002", "0003", "0004"]
    others = [line for line in second.splitlines() if not line.endswith(".png")]
    assert [line for line in others if not line.startswith("[Gloo]")] == []


FAILING = """
    import sys
    from arcflow_jax.cli.app import main
    from arcflow_jax.errors import UserError
    from arcflow_jax.parallel import together
    from arcflow_jax.training import embeddings

    together.PATIENCE = 2
    process, fails, *command = sys.argv[1:]
    embeddings.SHARD = 2
    embed_shard = embeddings.embed_shard
    def embed(encode, prompts, batch):
        if process == fails:
            raise UserError("no more")
        return embed_shard(encode, prompts, batch)
    embeddings.embed_shard = embed
    main([*command, "--process-id", process])
"""


def both(*arguments: object, own: tuple[object, object] = ("", ""), code: int = 0) -> list[str]:
    """stderr of two processes that run a command, in which "OWN" stands for what each has of its own."""
    address = free_address()
    running = [
        start(
            1,
            "-c",
            textwrap.dedent(FAILING),
            i,
            *(str(x).replace("OWN", str(own[i])) for x in arguments),
            "--processes",
            2,
            "--coordinator",
            address,
        )
        for i in (0, 1)
    ]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in running]
    assert [each for _, each in ended] == [code, code], ended
    return [text for text, _ in ended]


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_and_the_next_ones_resume(tiny_flux, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = ("--config", "tiny", f"--config.model={tiny_flux}", "--config.batch=2", "--out", tmp_path / "out")
    embed = ("embed-prompts", *recipe, f"--config.prompts={tmp_path}/prompts.txt")
    for fails in (0, 1):
        texts = both(fails, *embed, code=2)
        assert "error: no more" in texts[fails]
        assert f"error: process {fails} on " in texts[1 - fails]
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.lock").exists()
    both("none", *embed)
    shards = -(-read_description(tmp_path / "out").prompts // 2)
    assert sorted(files(tmp_path / "out"))[1:] == [f"shard-{i:05d}.safetensors" for i in range(shards)]


@pytest.mark.parametrize(
    ("prompt", "out", "message"),
    [
        (("a ring", "a square"), "out", "the prompts differ on process 1: all hosts have to start from the same"),
        (
            ("a ring", "a ring"),
            "OWN/out",
            "is not the same directory on all hosts: process 1 cannot see what process 0",
        ),
    ],
)
@pytest.mark.slow
def test_hosts_that_see_other_things_are_refused(tiny_flux, tmp_path, prompt, out, message):
    places = tmp_path / "0", tmp_path / "1"
    for place, text in zip(places, prompt, strict=True):
        place.mkdir()
        (place / "prompts.txt").write_text(text)
    size = ("--teacher", "--steps", 1, "--height", 32, "--width", 32, "--model", tiny_flux)
    command = ("sample", "--prompts-file", "OWN/prompts.txt", *size, "--out", out if "OWN" in out else tmp_path / out)
    for text in both("none", *command, own=places, code=2):
        assert message in text
    assert not list(tmp_path.rglob("*.png"))
