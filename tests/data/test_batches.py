"""The streams of prompts and resolutions: functions of the seed and the step."""

from __future__ import annotations

import collections

import pytest

from arcflow_jax.data.batches import draw_resolution, prompt_batches
from arcflow_jax.errors import UserError

PROMPTS = [f"prompt {i}" for i in range(24)]
SIZES = ((64, 64), (32, 96), (96, 32))


def test_each_round_has_every_prompt_once_in_an_order_of_its_own():
    batches = prompt_batches(PROMPTS, 8, seed=0)
    rounds = [[prompt for i in range(3 * r, 3 * r + 3) for prompt in batches[i]] for r in range(4)]
    assert all(sorted(each) == sorted(PROMPTS) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 4
    assert rounds[0] != PROMPTS


def test_the_stream_goes_on_anywhere():
    first, again, other = (prompt_batches(PROMPTS, 5, seed) for seed in (7, 7, 8))
    assert [again[i] for i in (90, 3, 41)] == [first[i] for i in (90, 3, 41)]
    assert [other[i] for i in range(4)] != [first[i] for i in range(4)]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_parts_make_the_batch_of_one_process(count):
    whole = prompt_batches(PROMPTS, 16, seed=3)
    parts = [prompt_batches(PROMPTS, 16, seed=3, part=(index, count)) for index in range(count)]
    for i in (0, 1, 17):
        assert [len(part[i]) for part in parts] == [16 // count] * count
        assert [prompt for part in parts for prompt in part[i]] == whole[i]


def test_batches_larger_than_the_list_go_round():
    batch = prompt_batches(PROMPTS[:3], 8, seed=0)[0]
    assert sorted(batch[:3]) == sorted(batch[3:6]) == PROMPTS[:3]


def test_parts_that_do_not_divide_the_batch():
    with pytest.raises(UserError, match="batch 6 is not divisible by 4"):
        prompt_batches(PROMPTS, 6, seed=0, part=(0, 4))


def test_resolutions_are_drawn_from_seed_and_step():
    def drawn(seed: int, steps: range) -> list[tuple[int, int]]:
        return [draw_resolution(SIZES, seed, i) for i in steps]

    first = drawn(0, range(3000))
    assert drawn(0, range(2999, -1, -1)) == first[::-1]
    assert drawn(1, range(3000)) != first
    assert all(abs(count - 1000) < 5 * 26 for count in collections.Counter(first).values())  # five deviations
    pairs = collections.Counter(zip(first[::2], first[1::2], strict=True))
    assert len(pairs) == 9
    assert all(abs(count - 1500 / 9) < 5 * 13 for count in pairs.values())  # one says nothing of the next
    assert draw_resolution(SIZES[:1], 0, 5) == (64, 64)
