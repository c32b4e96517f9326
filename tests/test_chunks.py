from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.chunks import length_sorted_chunks, vectors_in_chunks


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
