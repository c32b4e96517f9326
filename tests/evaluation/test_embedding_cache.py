import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.evaluation.embedding_cache import EmbeddingCache

MADE_FROM = {"weights": "a", "prompt": ""}


def cache_in(folder: Path, made_from=None, limit_bytes=1 << 30) -> EmbeddingCache:
    return EmbeddingCache(folder, made_from or MADE_FROM, 4, limit_bytes=limit_bytes)


def vectors_of(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), *text.encode().ljust(3)[:3]] for text in texts], dtype=np.float32)


def known(cache: EmbeddingCache, texts: list[str]) -> dict[str, list[float]]:
    places, vectors = cache.get(texts)
    return {texts[place]: vector.tolist() for place, vector in zip(places, vectors, strict=True)}


@settings(max_examples=30, deadline=None)
@given(
    puts=st.lists(st.lists(st.text(max_size=8), min_size=1, max_size=12, unique=True), max_size=8),
    asked=st.lists(st.text(max_size=8), max_size=20),
)
def test_what_was_put_comes_back_and_nothing_else(tmp_path_factory, puts, asked):
    folder = tmp_path_factory.mktemp("cache")
    cache, other = cache_in(folder), cache_in(folder)
    everything = set()
    for texts in puts:
        cache.put(texts, vectors_of(texts))
        everything |= set(texts)
        assert known(other, texts) == dict(zip(texts, vectors_of(texts).tolist(), strict=True))
    expected = {text: vectors_of([text])[0].tolist() for text in asked if text in everything}
    assert known(cache, asked) == known(other, asked) == expected


def test_what_decides_a_vector_is_part_of_its_key(tmp_path):
    cache_in(tmp_path).put(["a"], vectors_of(["a"]))
    assert known(cache_in(tmp_path), ["a"])
    assert not known(cache_in(tmp_path, {**MADE_FROM, "prompt": "query: "}), ["a"])
    assert not known(cache_in(tmp_path), ["a "])


def test_the_bytes_are_bounded_and_what_was_used_last_stays(tmp_path):
    texts = [[f"{number}-{i}" for i in range(100)] for number in range(4)]
    cache = cache_in(tmp_path)
    for number, part in enumerate(texts[:3]):
        before = set(tmp_path.glob("*/*.npy"))
        cache.put(part, vectors_of(part))
        [written] = set(tmp_path.glob("*/*.npy")) - before
        os.utime(written, (number, number))  # long ago, in this order
    assert known(cache, texts[0][:1])  # used now
    size = sum(file.stat().st_size for file in tmp_path.glob("*/*.npy"))
    small = cache_in(tmp_path, limit_bytes=size)
    small.put(texts[3], vectors_of(texts[3]))
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.npy")) <= size
    fresh = cache_in(tmp_path)
    assert [len(known(fresh, part)) for part in texts] == [100, 0, 100, 100]
    assert len(known(cache, texts[1])) == 100  # who has a removed segment open keeps it


def _write(folder: str, number: int) -> None:
    cache = cache_in(Path(folder))
    for i in range(20):
        texts = [f"{number}-{i}-{k}" for k in range(10)] + [f"shared-{i}"]
        cache.put(texts, vectors_of(texts))
        assert len(known(cache, texts)) == len(texts)


def test_writers_at_once_lose_nothing(tmp_path):
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as processes:
        list(processes.map(_write, [str(tmp_path)] * 4, range(4)))
    texts = [f"{number}-{i}-{k}" for number in range(4) for i in range(20) for k in range(10)]
    found = known(cache_in(tmp_path), texts)
    assert found == dict(zip(texts, vectors_of(texts).tolist(), strict=True))


def test_a_damaged_segment_and_a_disk_that_refuses_cost_only_time(tmp_path, caplog):
    cache = cache_in(tmp_path / "a")
    cache.put(["x", "y"], vectors_of(["x", "y"]))
    [segment] = (tmp_path / "a").glob("*/*.npy")
    segment.write_bytes(segment.read_bytes()[:40])
    assert known(cache_in(tmp_path / "a"), ["x"]) == {}
    (tmp_path / "b").write_text("a file where the folder should be")
    blocked = cache_in(tmp_path / "b")
    blocked.put(["x"], vectors_of(["x"]))
    assert "cannot be kept" in caplog.text and known(blocked, ["x"]) == {}


def test_many_segments_are_one_table(tmp_path):
    cache = cache_in(tmp_path)
    for start in range(0, 200_000, 20_000):
        texts = [str(i) for i in range(start, start + 20_000)]
        cache.put(texts, np.full((20_000, 4), start, dtype=np.float32))
    places, vectors = cache.get([str(i) for i in range(0, 400_000, 7)])
    assert len(places) == len(range(0, 200_000, 7))
    assert vectors[:, 0].tolist() == [i * 7 // 20_000 * 20_000 for i in places]


@pytest.mark.parametrize("texts", [[], ["a"]])
def test_an_empty_cache_knows_nothing(tmp_path, texts):
    places, vectors = cache_in(tmp_path).get(texts)
    assert places.tolist() == [] and vectors.shape == (0, 4)
