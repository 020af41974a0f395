"""What processes do together."""

from __future__ import annotations

import itertools
import textwrap

import pytest

from arcflow_jax.parallel import together
from tests.helpers.processes import finish, free_address, start

TOGETHER = """
    import sys, time
    from pathlib import Path
    from arcflow_jax.errors import UserError
    from arcflow_jax.parallel.processes import initialize, process_index
    from arcflow_jax.parallel.together import check_directory, check_same, from_first, gathered, writing_together
    from arcflow_jax.storage.lock import is_writer
    address, process, out = sys.argv[1:]
    initialize(address, 2, int(process))
    out, made = Path(out), []
    found = gathered([{"a": b"x" * 5000, "b": [1.5, None]}, None][int(process)])
    assert found == [{"a": b"x" * 5000, "b": [1.5, None]}, None], found
    assert from_first(lambda: made.append(process) or ["é" * 3000, 2**40]) == ["é" * 3000, 2**40]
    assert made == (["0"] if process == "0" else [])
    check_same({"the seeds": 1, "the prompts": ["a"]})
    try:
        check_same({"the seeds": 1, "the prompts": process})
    except UserError as error:
        print(error)
    with writing_together(out):
        assert is_writer(out / "file")
        assert (out.parent / ".out.lock").exists()
        out.mkdir(exist_ok=True)
        check_directory(out)
        if process == "1":
            time.sleep(1)
            (out / "late").touch()
    if process == "0":  # which has released the lock; the other one may come here before
        assert [path.name for path in out.parent.rglob("*") if path.is_file()] == ["late"]
"""


def test_two_processes(tmp_path):
    address = free_address()
    running = [start(1, "-c", textwrap.dedent(TOGETHER), address, i, tmp_path / "out") for i in (0, 1)]
    for process in running:
        assert finish(process).splitlines()[-1] == (
            "the prompts differ on process 1: all hosts have to start from the same"
        )


@pytest.mark.parametrize(("count", "batch"), [(0, 1), (1, 4), (7, 1), (8, 2), (9, 2), (64, 4)])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_are_whole_batches(monkeypatch, count, batch, processes):
    monkeypatch.setattr(together, "several", lambda: True)
    monkeypatch.setattr(together.jax, "process_count", lambda: processes)
    shares = []
    for process in range(processes):
        monkeypatch.setattr(together.jax, "process_index", lambda process=process: process)
        shares.append(together.own_share(count, batch))
    assert list(itertools.chain(*shares)) == list(range(count))
    assert all(share.start % batch == 0 for share in shares if share)
    batches = [-(-len(share) // batch) for share in shares]
    assert max(batches) - min(batches) <= 1
