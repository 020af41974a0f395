"""What training steps take: a function of seed and step alone."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Sequence

import pytest

from arcflow_jax.data.batches import Ahead, BucketedBatches, MixedBatches, draw_size, shuffled_batches
from arcflow_jax.errors import UserError

PROMPTS = [f"prompt {i}" for i in range(24)]
SIZES = ((64, 64), (32, 96), (96, 32))
WIDE, TALL = (32, 96), (96, 32)


def test_each_epoch_has_every_prompt_once_in_an_order_of_its_own():
    batches = shuffled_batches(PROMPTS, 8, seed=0)
    epochs = [[prompt for i in range(3 * r, 3 * r + 3) for prompt in batches[i]] for r in range(4)]
    assert all(sorted(each) == sorted(PROMPTS) for each in epochs)
    assert len({tuple(each) for each in epochs}) == 4
    assert epochs[0] != PROMPTS


def test_a_batch_does_not_depend_on_those_read_before():
    first, again, other = (shuffled_batches(PROMPTS, 5, seed) for seed in (7, 7, 8))
    assert [again[i] for i in (90, 3, 41)] == [first[i] for i in (90, 3, 41)]
    assert [other[i] for i in range(4)] != [first[i] for i in range(4)]


@pytest.mark.parametrize("rows", [[0], [4, 5, 6, 7], [0, 1, 8, 9], range(16)])
def test_a_process_takes_its_rows_of_the_whole_batch(rows):
    whole, own = shuffled_batches(PROMPTS, 16, seed=3), shuffled_batches(PROMPTS, 16, 3, rows)
    for i in (0, 1, 17):
        assert own[i] == [whole[i][row] for row in rows]


def test_batches_larger_than_the_list_repeat_it():
    batch = shuffled_batches(PROMPTS[:3], 8, seed=0)[0]
    assert sorted(batch[:3]) == sorted(batch[3:6]) == PROMPTS[:3]


def test_sizes_are_drawn_from_seed_and_step():
    def drawn(seed: int, steps: range) -> list[tuple[int, int]]:
        return [draw_size(SIZES, seed, i) for i in steps]

    first = drawn(0, range(3000))
    assert drawn(0, range(2999, -1, -1)) == first[::-1]
    assert drawn(1, range(3000)) != first
    assert all(abs(count - 1000) < 5 * 26 for count in collections.Counter(first).values())  # five deviations
    pairs = collections.Counter(zip(first[::2], first[1::2], strict=True))
    assert len(pairs) == 9
    assert all(abs(count - 1500 / 9) < 5 * 13 for count in pairs.values())  # one says nothing of the next
    assert draw_size(SIZES[:1], 0, 5) == (64, 64)


def test_mixed_batches_pair_the_streams_of_prompts_and_sizes():
    mixed, prompts = MixedBatches(PROMPTS, SIZES, 4, 5, [1, 3]), shuffled_batches(PROMPTS, 4, 5, [1, 3])
    assert [mixed[i] for i in (7, 0)] == [(prompts[i], draw_size(SIZES, 5, i)) for i in (7, 0)]


def buckets(seed: int = 0, rows: Sequence[int] | None = None) -> BucketedBatches:
    """Eighteen wide prompts and six tall ones, in batches of six."""
    return BucketedBatches(PROMPTS, [TALL if i % 4 == 0 else WIDE for i in range(24)], 6, seed, rows)


def test_each_batch_has_one_size_that_of_its_prompts():
    batches = buckets()
    for i in range(40):
        prompts, size = batches[i]
        assert len(prompts) == 6
        assert all((int(prompt.split()[1]) % 4 == 0) == (size == TALL) for prompt in prompts)


def test_a_size_is_drawn_as_often_as_it_has_prompts():
    batches = buckets()
    tall = sum(batches[i][1] == TALL for i in range(400))
    assert abs(tall - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5  # five deviations of a binomial


def test_every_prompt_of_a_size_is_seen_once_in_an_epoch_of_that_size():
    batches = buckets()
    of_size = collections.defaultdict(list)
    for i in range(60):
        prompts, size = batches[i]
        of_size[size].append(prompts)
    wide = [prompt for batch in of_size[WIDE][:3] for prompt in batch]  # 18 prompts, 3 batches
    assert len(wide) == len(set(wide)) == 18
    assert all(len(set(batch)) == 6 for batch in of_size[TALL])


def test_buckets_resume_anywhere_and_split_into_rows():
    straight, resumed, other = buckets(3), buckets(3), buckets(4)
    expected = [straight[i] for i in range(50)]
    assert [resumed[i] for i in (40, 3, 49)] == [expected[i] for i in (40, 3, 49)]
    assert [other[i] for i in range(50)] != expected
    left, right = buckets(3, range(3)), buckets(3, range(3, 6))
    for i in (0, 11, 30):
        assert (left[i][0] + right[i][0], left[i][1], right[i][1]) == (*expected[i], expected[i][1])


def idle() -> bool:
    """Devices that have nothing to do."""
    return False


def test_one_step_is_loaded_while_the_one_before_is_used():
    begun = [threading.Event() for _ in range(4)]

    def load(step: int) -> int:
        begun[step].set()
        return 10 * step

    with Ahead(load, range(1, 4)) as data:
        assert data.take(idle) == 10
        assert begun[2].wait(10)  # while step 1 is used
        assert not begun[3].is_set()
        assert [data.take(idle), data.take(idle)] == [20, 30]


def test_the_time_waited_for_data_is_counted_where_the_devices_are_idle():
    with Ahead(lambda step: time.sleep(0.2), range(3)) as data:
        data.take(idle)
        assert 0.1 < data.waited < 5
        before = data.waited
        data.take(lambda: True)
        assert data.waited == before
        time.sleep(1)  # a training step, longer than loading
        data.take(idle)
        assert data.waited - before < 0.1


def test_an_error_of_loading_is_raised_for_its_step():
    def load(step: int) -> int:
        if step == 1:
            raise UserError("no image")
        return step

    with Ahead(load, range(3)) as data:
        assert data.take(idle) == 0
        with pytest.raises(UserError, match="no image"):
            data.take(idle)
