from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.chunks import dealt_chunks, length_sorted_chunks, vectors_in_chunks


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(16, 500), st.sampled_from([0.0, 0.9]))
def test_chunks_cover_every_index_once_within_budget(lengths: list[int], budget: int, similar: float):
    array = np.array(lengths)
    chunks = length_sorted_chunks(array, budget, similar=similar)
    for chunk in chunks:
        alike = (array[chunk] >= similar * array[chunk].max()).sum()
        assert alike == len(chunk) or alike * array[chunk].max() < budget // 8
    assert sorted(np.concatenate(chunks)) == list(range(len(lengths)))
    assert all(len(chunk) * array[chunk].max() <= budget or len(chunk) == 1 for chunk in chunks)
    assert (np.diff(array[np.concatenate(chunks)]) <= 0).all()


@given(st.lists(st.integers(1, 300), max_size=120), st.integers(64, 1024), st.integers(1, 5))
def test_workers_get_the_chunks_of_one_evenly(lengths: list[int], budget: int, workers: int):
    array = np.array(lengths, dtype=np.int64)
    dealt = dealt_chunks(array, budget, workers)
    numbered = dict(pair for own in dealt for pair in own)
    assert len(dealt) == workers and sorted(numbered) == list(range(len(numbered)))
    halved = [length_sorted_chunks(array, budget >> halving) for halving in range(4)]
    cuts = [[chunk.tolist() for chunk in cut] for cut in halved]
    assert [numbered[i].tolist() for i in range(len(numbered))] in (cuts if workers > 1 else cuts[:1])
    assert all([i for i, _ in own] == sorted(i for i, _ in own) for own in dealt)
    costs = [[len(chunk) * array[chunk].max() + budget / 32 for _, chunk in own] for own in dealt]
    assert max(map(sum, costs)) <= sum(map(sum, costs)) / workers + max([0, *(c for own in costs for c in own)]) + 1e-9


def test_dealing_whole_chunks_pads_no_more_than_one_worker():
    lengths = np.random.default_rng(0).integers(5, 40, size=768)
    padded = [
        sum(
            len(chunk) * lengths[chunk].max() for own in dealt_chunks(lengths, 1024, n, similar=0.9) for _, chunk in own
        )
        for n in (1, 2, 3)
    ]
    assert padded[0] == padded[1] == padded[2] < 1.1 * lengths.sum()


def test_few_chunks_for_many_workers_are_cut_smaller():
    lengths = np.full(96, 10)
    dealt = dealt_chunks(lengths, 960, 4)
    assert [sum(len(chunk) for _, chunk in own) for own in dealt] == [24] * 4


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(16, 200))
def test_vectors_come_back_in_the_order_given(lengths: list[int], budget: int):
    tokens = [np.full(length, i) for i, length in enumerate(lengths)]
    sizes = []

    def forward(rows: list[np.ndarray]) -> np.ndarray:
        sizes.append(len(rows) * max(map(len, rows)) if len(rows) > 1 else 0)
        return np.array([[row[0], len(row)] for row in rows], dtype=np.float32)

    vectors = vectors_in_chunks(tokens, 2, budget, forward)
    assert vectors.tolist() == [[i, length] for i, length in enumerate(lengths)]
    assert all(size <= budget for size in sizes)
