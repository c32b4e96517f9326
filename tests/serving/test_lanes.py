"""The laws of the lanes: which texts go together, and who may overtake whom."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.serving.lanes import Lanes, Text, plan_window

LAW = settings(deadline=None)


def text(tokens: int, age: int) -> Text:
    return Text(np.zeros(tokens, dtype=np.int64), age.to_bytes(4, "little"), float(age), rows={"somebody": [0]})


def drained(lanes: Lanes) -> list[list[Text]]:
    batches = []
    while batch := lanes.next_batch():
        batches.append(batch)
    return batches


@LAW
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(4, 128), st.integers(1, 6))
def test_a_window_is_a_prefix_of_the_queue(lengths: list[int], batch_tokens: int, max_batches: int):
    batches = plan_window(lengths, batch_tokens, max_batches)
    assert 1 <= len(batches) <= max_batches
    taken = sorted(index for batch in batches for index in batch)
    assert taken == list(range(len(taken)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= batch_tokens for b in batches)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest)
    # Nothing is left behind for no reason: the whole queue is taken if it fits.
    if len(taken) < len(lengths):
        assert len(plan_window(lengths, batch_tokens, len(lengths))) > max_batches


ARRIVALS = st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.integers(0, 3)), min_size=1, max_size=80)


@LAW
@given(ARRIVALS, st.integers(8, 64), st.integers(1, 4))
def test_nobody_is_overtaken_more_often_than_promised(
    arrivals: list[tuple[int, bool, int]], batch_tokens: int, window_batches: int
):
    """Overtaken: a batch without the text, holding a younger one, runs after it came and before its own batch."""
    lanes = Lanes(batch_tokens, window_batches)
    ran: list[list[Text]] = []
    queued_after: dict[float, int] = {}
    fast_of: dict[float, bool] = {}
    for age, (tokens, fast, batches) in enumerate(arrivals):
        queued_after[age], fast_of[age] = len(ran), fast
        lanes.put(text(tokens, age), fast=fast)
        ran += [batch for _ in range(batches) if (batch := lanes.next_batch())]
    ran += drained(lanes)
    assert sorted(one.queued_at for batch in ran for one in batch) == list(range(len(arrivals)))
    for place, batch in enumerate(ran):
        assert len(batch) == 1 or len(batch) * max(len(one.ids) for one in batch) <= batch_tokens
        assert len({fast_of[one.queued_at] for one in batch}) == 1
        for one in batch:
            before = ran[queued_after[one.queued_at] : place]
            own = [b for b in before if fast_of[b[0].queued_at] == fast_of[one.queued_at]]
            other = [b for b in before if fast_of[b[0].queued_at] != fast_of[one.queued_at]]
            assert sum(max(o.queued_at for o in b) > one.queued_at for b in own) <= window_batches - 1
            assert len(other) <= len(own) + 1


def test_lanes_take_turns_while_both_wait():
    lanes = Lanes(batch_tokens=10, window_batches=2)
    for age in range(6):
        lanes.put(text(10, age), fast=age >= 3)
    assert [batch[0].queued_at for batch in drained(lanes)] == [3, 0, 4, 1, 5, 2]
    for age in range(4):
        lanes.put(text(10, age), fast=False)
    assert [batch[0].queued_at for batch in drained(lanes)] == [0, 1, 2, 3]  # alone, it need not wait
    assert not lanes


@pytest.mark.parametrize("cut", [False, True])
def test_who_nobody_waits_for_is_skipped(cut: bool):
    lanes = Lanes(batch_tokens=10, window_batches=4)
    texts = [text(10, age) for age in range(4)]
    for one in texts:
        lanes.put(one, fast=True)
    if cut:  # the others are in the window already
        assert lanes.next_batch() == [texts[0]]
    for one in texts[:3]:
        one.rows.clear()
    assert lanes and lanes.next_batch() == [texts[3]]
    assert lanes.next_batch() == [] and not lanes
