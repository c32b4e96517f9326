from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.serving.tuning import CANDIDATES, GOOD_ENOUGH, tuned_batch_tokens


def device(per_call: float, per_token: float, cache_tokens: float = float("inf")):
    """Seconds of a forward with a fixed cost, dearer tokens once a batch outgrows the cache."""

    def seconds(rows: int, length: int) -> float:
        tokens = rows * length
        return per_call + tokens * per_token * (1.5 if tokens > cache_tokens else 1.0)

    return seconds


@given(st.floats(0, 0.1), st.floats(1e-6, 1e-3))
def test_the_smallest_budget_near_the_best_is_taken(per_call: float, per_token: float):
    seconds = device(per_call, per_token)
    found = tuned_batch_tokens(seconds, [16, 64])
    rate = {budget: budget / seconds(budget // 16, 16) for budget in CANDIDATES}
    tried = [budget for budget in CANDIDATES if rate[budget] > 0 and budget <= 4 * found]
    assert rate[found] >= GOOD_ENOUGH * max(rate[budget] for budget in tried) * 0.999
    assert all(rate[budget] < GOOD_ENOUGH * max(rate.values()) * 1.001 for budget in CANDIDATES if budget < found)


def test_a_device_with_a_dear_call_gets_large_batches_and_a_cache_bounds_them():
    assert tuned_batch_tokens(device(0.0, 1e-4), [16]) == CANDIDATES[0]
    assert tuned_batch_tokens(device(0.1, 1e-6), [16]) == CANDIDATES[-1]
    assert tuned_batch_tokens(device(0.005, 1e-4, cache_tokens=1024), [16, 64]) == 1024


def test_larger_budgets_are_not_tried_without_hope():
    tried = []

    def seconds(rows: int, length: int) -> float:
        tried.append(rows * length)
        return 1e-4 * rows * length

    tuned_batch_tokens(seconds, [16, 64])
    assert max(tried) == CANDIDATES[2]


def test_a_lone_disturbance_does_not_decide():
    quiet = tuned_batch_tokens(device(0.005, 1e-4), [16, 64])
    calls: dict[tuple[int, int], int] = {}

    def seconds(rows: int, length: int) -> float:
        shape = rows, length
        calls[shape] = calls.get(shape, 0) + 1
        disturbed = calls[shape] == 1 and rows * length == quiet
        return (0.005 + 1e-4 * rows * length) * (9 if disturbed else 1)

    assert tuned_batch_tokens(seconds, [16, 64]) == quiet
    assert max(calls.values()) == 3


@pytest.mark.parametrize("length", [100, 5000])
def test_texts_longer_than_a_budget_go_alone(length: int):
    assert tuned_batch_tokens(device(0.001, 1e-4), [length]) in CANDIDATES
