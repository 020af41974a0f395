"""The streams of prompts and resolutions: a function of seed and iteration alone."""

from __future__ import annotations

import collections

import pytest

from arcflow_jax.data import prompt_batches, resolution_stream
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
    with pytest.raises(UserError, match="batch 6 does not divide by the 4 parts"):
        prompt_batches(PROMPTS, 6, seed=0, part=(0, 4))


def test_resolutions_are_drawn_from_seed_and_iteration():
    stream, again, other = (resolution_stream(SIZES, seed) for seed in (0, 0, 1))
    drawn = [stream[i] for i in range(60)]
    assert [again[i] for i in range(59, -1, -1)] == drawn[::-1]
    assert [other[i] for i in range(60)] != drawn
    assert collections.Counter(drawn) == dict.fromkeys(SIZES, 20)
    assert len({tuple(drawn[i : i + 3]) for i in range(0, 60, 3)}) > 3  # in many orders
    assert [resolution_stream(SIZES[:1], 0)[i] for i in (0, 5)] == [(64, 64)] * 2
    twice = resolution_stream((*SIZES, SIZES[0]), 0)
    assert collections.Counter(twice[i] for i in range(8))[SIZES[0]] == 4
