"""EncoderPool: the same vectors as one Encoder, whatever happens to the actors."""

import os
import random
import signal
import threading
import time

import numpy as np
import pytest

from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.evaluation import pool as pool_module
from gist_ray.evaluation.encoder_actor import nearest
from gist_ray.evaluation.pool import EncoderPool, encoder_pool

WORDS = "ray actor guide student query answer river mountain train model vector cloud loss batch tree".split()


def texts_of(count: int, seed: int, longest: int = 60) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def encoder(minilm):
    return Encoder.load(minilm)


@pytest.fixture(scope="module")
def pool(ray_session, minilm):
    with encoder_pool(minilm, workers=2, batch_tokens=512, cpus=0.5) as pool:
        yield pool


def process_ids(pool: EncoderPool) -> list[int]:
    import ray

    return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in pool.actors])


def test_equals_one_encoder_in_the_order_given(pool, encoder):
    texts = [*texts_of(150, seed=0), "", "ß 中文 🙂", "x" * 3000]
    expected = encoder.encode(texts)
    found = pool.encode(texts)
    assert found.dtype == np.float32 and found.shape == (len(texts), encoder.dim)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_prompt_is_put_before_every_text(pool, encoder):
    texts = texts_of(10, seed=1)
    found = pool.encode(texts, prompt="query: ")
    np.testing.assert_allclose(found, encoder.encode(texts, prompt="query: "), atol=1e-6)
    assert np.abs(found - pool.encode(texts)).max() > 0.01


def test_equal_texts_are_computed_once(pool, encoder, monkeypatch):
    sent = []
    cut = EncoderPool._cut
    monkeypatch.setattr(EncoderPool, "_cut", lambda self, texts, most: sent.extend(texts) or cut(self, texts, most))
    found = pool.encode(["b", "a", "b", "a", "c", "b"])
    assert sorted(sent) == ["a", "b", "c"]
    np.testing.assert_allclose(found, encoder.encode(["b", "a", "b", "a", "c", "b"]), atol=1e-6)


def test_what_encoders_did_is_counted(pool):
    texts, before, started = texts_of(40, seed=9), pool.spent.copy(), time.perf_counter()
    vectors = pool.encode(texts * 2)
    first = pool.spent.since(before)
    assert (first.texts, first.distinct, first.cached) == (80, 40, 0)
    assert 0 < first.encode_s < len(pool.actors) * (time.perf_counter() - started)
    list(pool.nearest(vectors[:3], texts, "", 5))
    both = pool.spent.since(before)
    assert (both.texts, both.distinct) == (120, 80) and both.encode_s > first.encode_s


def test_nothing_in_nothing_out(pool):
    assert pool.encode([]).shape == (0, pool.facts.dim)
    assert list(pool.nearest(np.zeros((3, pool.facts.dim), np.float32), [], "", 5)) == []


def test_chunks_cover_every_row_once_and_feed_every_actor(pool):
    chunks = pool._cut(texts_of(400, seed=2), 16)
    assert sorted(np.concatenate(chunks)) == list(range(400))
    assert len(chunks) >= 2 * len(pool.actors)
    assert len(pool._cut(["short"] * 3, 16)) == 1


def test_the_parts_of_a_search_hold_the_nearest_of_all(pool, encoder):
    texts = texts_of(200, seed=4) + texts_of(20, seed=4)  # some twice
    queries = encoder.encode(texts_of(7, seed=5))
    everything = queries @ encoder.encode(texts).T
    found = [{} for _ in queries]
    covered = 0
    for places, scores in pool.nearest(queries, texts, "", 10):
        assert places.shape == scores.shape and places.shape[1] <= 10
        covered += 1
        for row in range(len(queries)):
            found[row] |= dict(zip(places[row].tolist(), scores[row].tolist(), strict=True))
            assert (np.diff(scores[row]) <= 0).all()
    assert covered > 2
    for row in range(len(queries)):
        best = np.sort(everything[row])[::-1][:10]
        np.testing.assert_allclose(sorted(found[row].values(), reverse=True)[:10], best, atol=1e-5)
        np.testing.assert_allclose(list(found[row].values()), everything[row][list(found[row])], atol=1e-5)


def test_nearest_is_tiled(monkeypatch):
    generator = np.random.default_rng(0)
    queries, vectors = (generator.normal(size=(n, 8)).astype(np.float32) for n in (30, 50))
    whole = nearest(queries, vectors, 5)
    monkeypatch.setattr("gist_ray.evaluation.encoder_actor._SIMILARITIES", 100)
    tiled = nearest(queries, vectors, 5)
    assert np.array_equal(whole[0], tiled[0]) and whole[0].shape == (30, 5)
    assert np.array_equal(whole[0], np.argsort(-(queries @ vectors.T), axis=1)[:, :5])
    assert nearest(queries, vectors, 80)[0].shape == (30, 50)


def test_callers_at_once_share_the_actors(pool, encoder):
    texts = [texts_of(60, seed=seed) for seed in range(10, 14)]
    found = {}

    def call(i):
        found[i] = pool.encode(texts[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_allclose(found[i], encoder.encode(texts[i]), atol=1e-6)


def test_killed_actors_start_again_and_nothing_is_lost(pool, encoder):
    texts = texts_of(300, seed=3, longest=20)
    before = process_ids(pool)

    def kill():
        time.sleep(0.3)
        for pid in before:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    found = pool.encode(texts * 2 + texts_of(2000, seed=6))[: len(texts)]
    thread.join()
    np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-6)
    assert not set(process_ids(pool)) & set(before)


def test_a_stopped_actor_does_not_stop_the_others(pool, encoder, monkeypatch):
    """As a node that is gone without a word: what it had is given to another actor."""
    monkeypatch.setattr(pool_module, "_LOOK_S", 0.2)
    monkeypatch.setattr(pool_module, "_LATE_S", 1.0)
    texts, [stopped, _] = texts_of(40, seed=7), process_ids(pool)
    os.kill(stopped, signal.SIGSTOP)
    try:
        np.testing.assert_allclose(pool.encode(texts), encoder.encode(texts), atol=1e-6)
    finally:
        os.kill(stopped, signal.SIGCONT)


def test_texts_that_end_every_actor_are_reported_not_retried_for_ever(ray_session, minilm, monkeypatch):
    monkeypatch.setattr(pool_module, "_DEATHS", 1)
    with encoder_pool(minilm, workers=1, cpus=0.1) as pool:
        [pid] = process_ids(pool)
        timer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
        timer.start()
        with pytest.raises(RuntimeError, match=r"died 1 times on the same \d+ texts; out of memory"):
            pool.encode([f"{i} " + "word " * 400 for i in range(300)])


def test_a_model_that_cannot_be_loaded_is_one_readable_error(ray_session, tmp_path):
    with pytest.raises(InputError) as caught, encoder_pool(tmp_path, workers=1, cpus=0.1):
        pass
    assert "Traceback" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_vectors_are_kept_from_run_to_run(ray_session, minilm, tmp_path, encoder):
    texts, kept = texts_of(30, seed=8), (tmp_path / "kept", 1 << 30, {"model": "minilm"})
    with encoder_pool(minilm, workers=1, cpus=0.1, cache=kept) as pool:
        first = pool.encode(texts)
        assert pool.encode(texts, prompt="query: ").shape == first.shape
    segments = set((tmp_path / "kept").glob("*/*.npy"))
    assert len({segment.parent for segment in segments}) == 2  # one for each prompt
    with encoder_pool(minilm, workers=1, cpus=0.1, cache=kept) as pool:
        again = pool.encode([*texts[::-1], "a new one"])
        assert (pool.spent.texts, pool.spent.distinct, pool.spent.cached) == (31, 31, 30)
    np.testing.assert_array_equal(again[:-1], first[::-1])
    np.testing.assert_allclose(again[-1:], encoder.encode(["a new one"]), atol=1e-6)
    assert len(set((tmp_path / "kept").glob("*/*.npy")) - segments) == 1


def test_closing_frees_the_actors(ray_session, minilm):
    import ray

    with encoder_pool(minilm, workers=1, cpus=0.1) as pool:
        [actor] = pool.actors
        assert process_ids(pool)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.encode.remote(["a"], ""), timeout=30)
