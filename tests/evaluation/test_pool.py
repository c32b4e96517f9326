"""EncoderPool: the same vectors as one Encoder, whatever happens to the actors."""

import os
import random
import signal

import numpy as np
import pytest

from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.evaluation.pool import EncoderPool

WORDS = "ray actor guide student query answer river mountain train model vector cloud loss batch tree".split()


def texts_of(count: int, seed: int, longest: int = 60) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def encoder(minilm):
    return Encoder.load(minilm)


@pytest.fixture(scope="module")
def pool(ray_session, minilm):
    with EncoderPool(minilm, workers=2, batch_tokens=512, cpus=0.5) as pool:
        yield pool


def process_ids(pool: EncoderPool) -> list[int]:
    import ray

    return ray.get([worker.actor.__ray_call__.remote(lambda _: os.getpid()) for worker in pool._workers])


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
    cut = pool._cut
    monkeypatch.setattr(pool, "_cut", lambda texts: sent.extend(texts) or cut(texts))
    found = pool.encode(["b", "a", "b", "a", "c", "b"])
    assert sorted(sent) == ["a", "b", "c"]
    np.testing.assert_allclose(found, encoder.encode(["b", "a", "b", "a", "c", "b"]), atol=1e-6)


def test_nothing_in_nothing_out(pool):
    assert pool.encode([]).shape == (0, pool.dim)


def test_chunks_cover_every_row_once_and_feed_every_actor(pool):
    chunks = pool._cut(texts_of(400, seed=2))
    assert sorted(np.concatenate(chunks)) == list(range(400))
    assert len(chunks) >= 2 * len(pool._workers)
    assert len(pool._cut(["short"] * 3)) == 1


def test_killed_actors_are_replaced_and_nothing_is_lost(pool, encoder, monkeypatch):
    texts = texts_of(300, seed=3, longest=20)
    before = process_ids(pool)
    take_one, in_flight = pool._take_one, []

    def kill_all_then_take(job):
        if not in_flight:
            in_flight.append(len(job.running))
            for pid in before:
                os.kill(pid, signal.SIGKILL)
        take_one(job)

    monkeypatch.setattr(pool, "_take_one", kill_all_then_take)
    found = pool.encode(texts)
    assert in_flight[0] >= 2
    np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-6)
    assert not set(process_ids(pool)) & set(before)


def test_texts_that_end_every_actor_are_reported_not_retried_for_ever(ray_session, minilm, monkeypatch):
    with EncoderPool(minilm, workers=1, cpus=0.1) as pool:
        take_one, [pid] = pool._take_one, process_ids(pool)

        def kill_then_take(job):
            os.kill(pid, signal.SIGKILL)
            take_one(job)

        monkeypatch.setattr(pool, "_take_one", kill_then_take)
        monkeypatch.setattr("gist_ray.evaluation.pool._MAX_LOSSES", 1)
        with pytest.raises(RuntimeError, match="died on the same 1 texts; out of memory"):
            pool.encode(["word " * 100_000])


def test_a_model_that_cannot_be_loaded_is_one_readable_error(ray_session, tmp_path):
    with pytest.raises(InputError) as caught:
        EncoderPool(tmp_path, workers=1, cpus=0.1)
    assert "Traceback" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_closing_frees_the_actors(ray_session, minilm):
    import ray

    with EncoderPool(minilm, workers=1, cpus=0.1) as pool:
        [pid] = process_ids(pool)
        actor = pool._workers[0].actor
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.encode.remote(["a"], "", 64), timeout=30)
    assert pid
