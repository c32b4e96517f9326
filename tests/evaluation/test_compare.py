"""Properties of the paired bootstrap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.errors import InputError
from gist_ray.evaluation import compare
from gist_ray.evaluation.compare import Interval, paired_bootstrap, paired_items

score = st.floats(0, 1, width=32)
scores = st.lists(score, min_size=1, max_size=40)
pairs = st.lists(st.tuples(score, score), min_size=1, max_size=40).map(lambda rows: tuple(zip(*rows, strict=True)))


@settings(max_examples=50, deadline=None)
@given(pairs, st.integers(0, 2**32 - 1))
def test_interval_lies_in_the_range_of_the_differences_and_is_repeatable(pair, seed):
    before, after = pair
    found = paired_bootstrap(before, after, samples=200, seed=seed)
    differences = np.subtract(after, before)
    slack = 1e-9
    assert found.low <= found.high
    assert differences.min() - slack <= found.low and found.high <= differences.max() + slack
    assert found.mean_difference == pytest.approx(differences.mean())
    assert found == paired_bootstrap(before, after, samples=200, seed=seed)


@settings(max_examples=50, deadline=None)
@given(pairs, st.integers(0, 2**32 - 1))
def test_swapping_the_sides_mirrors_the_interval(pair, seed):
    before, after = pair
    found = paired_bootstrap(before, after, samples=200, seed=seed)
    mirrored = paired_bootstrap(after, before, samples=200, seed=seed)
    assert mirrored.low == pytest.approx(-found.high, abs=1e-9)
    assert mirrored.high == pytest.approx(-found.low, abs=1e-9)


@given(scores, st.floats(-1, 1))
def test_a_constant_gain_is_certain(before, gain):
    found = paired_bootstrap(before, np.add(before, gain), samples=50)
    assert [found.low, found.high, found.mean_difference] == pytest.approx([gain] * 3, abs=1e-9)
    assert found.excludes_zero or abs(gain) <= 1e-9


def test_width_is_that_of_the_normal_approximation():
    generator = np.random.default_rng(0)
    before = generator.random(2000)
    after = before + generator.normal(0.02, 0.3, 2000)
    found = paired_bootstrap(before, after, samples=4000, seed=1)
    error = (after - before).std() / np.sqrt(2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.low < found.mean_difference < found.high


def test_memory_is_bounded_and_blocks_cover_every_sample(monkeypatch):
    monkeypatch.setattr(compare, "_BLOCK_ELEMENTS", 64)  # 6 samples a block, 101 samples: a last block of 5
    found = paired_bootstrap(np.zeros(10), np.arange(10.0), samples=101, seed=3)
    assert 0 <= found.low < 4.5 < found.high <= 9


def test_excludes_zero():
    assert Interval(0.1, 0.01, 0.2).excludes_zero and Interval(-0.1, -0.2, -0.01).excludes_zero
    assert not Interval(0.1, -0.01, 0.2).excludes_zero


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([], [], "at least one"),
        ([1.0], [1.0, 2.0], "same items"),
        ([[1.0]], [[1.0]], "same items"),
        ([1.0, float("nan")], [1.0, 2.0], "item 1"),
    ],
)
def test_unusable_input_is_named(before, after, words):
    with pytest.raises(InputError, match=words):
        paired_bootstrap(before, after)


def test_items_are_paired_by_id():
    assert paired_items({"b": 2.0, "a": 1.0}, {"a": 3.0, "b": 4.0}) == ([1.0, 2.0], [3.0, 4.0])
    with pytest.raises(InputError, match=r"1 items are scored on one side only, e\.g\. c"):
        paired_items({"a": 1.0}, {"a": 1.0, "c": 2.0})
