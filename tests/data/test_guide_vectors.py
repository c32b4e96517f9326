from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.data.guide_vectors import GuideVectors
from gist_ray.data.texts import text_key
from gist_ray.errors import InputError

GUIDE = {"weights": "abc", "pooling": "mean", "dtype": "float16"}


def keys_of(numbers) -> np.ndarray:
    return np.sort(np.array([text_key(str(n)) for n in numbers], dtype="S16"))


def vectors_of(keys: np.ndarray, dim: int = 4) -> np.ndarray:
    """A vector that tells its key."""
    raw = np.frombuffer(keys.tobytes(), np.uint8).reshape(len(keys), 16)
    return raw[:, :dim].astype(np.float16)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 40), min_size=1), max_size=5), st.sets(st.integers(0, 60), min_size=1))
def test_what_was_added_is_found_and_nothing_else(tmp_path_factory, added: list[set[int]], asked: set[int]):
    root = tmp_path_factory.mktemp("store")
    for numbers in added:
        keys = keys_of(numbers)
        GuideVectors(root, GUIDE).add(keys, vectors_of(keys))
    keys = keys_of(asked)
    found, vectors = GuideVectors(root, GUIDE).find(keys)
    known = keys_of(set().union(*added)) if added else keys[:0]
    np.testing.assert_array_equal(found, np.isin(keys, known))
    if found.any():
        np.testing.assert_array_equal(vectors, vectors_of(keys[found]))
    else:
        assert vectors is None


def test_another_guide_or_setting_is_another_store(tmp_path: Path):
    keys = keys_of(range(5))
    GuideVectors(tmp_path, GUIDE).add(keys, vectors_of(keys))
    other = GuideVectors(tmp_path, GUIDE | {"pooling": "cls"})
    assert not other.find(keys)[0].any()
    assert (other.folder / "guide.txt").is_file()


def test_of_two_vectors_of_a_text_the_same_is_found_every_time(tmp_path: Path):
    keys = keys_of(range(5))
    store = GuideVectors(tmp_path, GUIDE)
    store.add(keys, vectors_of(keys))
    store.add(keys[:3], np.zeros((3, 4), np.float16))
    again = [GuideVectors(tmp_path, GUIDE).find(keys)[1] for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_a_damaged_segment_is_named(tmp_path: Path):
    keys = keys_of(range(5))
    store = GuideVectors(tmp_path, GUIDE)
    store.add(keys, vectors_of(keys))
    [segment] = store.folder.glob("*.arrow")
    segment.write_bytes(segment.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"\.arrow is damaged .*; remove it"):
        GuideVectors(tmp_path, GUIDE).find(keys)
