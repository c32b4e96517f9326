from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.serving.cache import VectorCache


def vector(number: int, dim: int = 4) -> np.ndarray:
    return np.full(dim, number, dtype=np.float32)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=40), st.integers(0, 3))
def test_it_holds_what_was_used_last(uses: list[tuple[bool, int]], room: int):
    entry = len(b"0000") + vector(0).nbytes + 250
    cache, model = VectorCache(room * entry), []  # the model: keys, those used last at the end
    for put, number in uses:
        key = b"%04d" % number
        if put:
            cache.put(key, vector(number))
            model = [*(k for k in model if k != key), key][-room:] if room else []
        else:
            found = cache.get(key)
            assert (found is not None) == (key in model)
            if found is not None:
                np.testing.assert_array_equal(found, vector(number))
                model = [*(k for k in model if k != key), key]
        assert len(cache) == len(model) and cache.bytes == len(model) * entry <= cache.max_bytes
    for key in [b"%04d" % number for number in range(5)]:
        assert (cache.get(key) is not None) == (key in model)


def test_a_vector_that_was_read_outlives_one_that_was_not():
    cache = VectorCache(2 * (1 + vector(0).nbytes + 250))
    for number, key in enumerate((b"a", b"b")):
        cache.put(key, vector(number))
    cache.get(b"a")
    cache.put(b"c", vector(2))
    assert cache.get(b"a") is not None and cache.get(b"b") is None


def test_what_is_kept_is_its_own_and_cannot_be_changed():
    cache, batch = VectorCache(1000), np.ones((3, 4), dtype=np.float32)
    cache.put(b"a", batch[1])
    batch[:] = 7
    kept = cache.get(b"a")
    assert kept is not None
    np.testing.assert_array_equal(kept, np.ones(4))
    assert kept.base is None  # else the whole batch would stay in memory
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 2


def test_a_vector_larger_than_the_cache_drives_nobody_out():
    cache = VectorCache(400)
    cache.put(b"a", vector(1))
    cache.put(b"b", vector(2, 500))
    assert cache.get(b"b") is None and cache.get(b"a") is not None
