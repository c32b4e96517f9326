"""The real model behind the engine's seam."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.serving.engine import Engine, FakeEngine, TorchEngine
from gist_ray.serving.scheduler import Scheduler

SUBJECTS = ("a cat", "the committee", "rain in the mountains", "gene expression", "my grandmother's clock")
TEXTS = [" ".join([subject, "and"] * (1 + 3 * i % 17) + [f"number {i}"]) for i, subject in enumerate(SUBJECTS * 8)] + [
    "   ",
    "naïve café — 数学 🙂",
    "word " * 700,
]


@pytest.fixture(scope="module")
def engine(minilm) -> TorchEngine:
    threads = torch.get_num_threads()
    yield TorchEngine.load(minilm, threads=1)
    torch.set_num_threads(threads)


def test_threads_are_set_also_for_the_thread_of_the_forward(engine):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [1]


def test_forward_equals_encode_whatever_the_batch(engine):
    expected = engine.encoder.encode(TEXTS)
    tokens = engine.tokenize(TEXTS)
    together = engine.forward(tokens)
    assert together.dtype == np.float32 and together.shape == (len(TEXTS), engine.dim)
    assert np.abs(together - expected).max() < 1e-5
    one_by_one = np.concatenate([engine.forward([row]) for row in tokens[::7]])
    assert np.abs(one_by_one - expected[::7]).max() < 1e-5


def test_through_the_scheduler_among_others_equals_encode(engine):
    async def run() -> None:
        async with Scheduler(engine, batch_tokens=512, window_batches=3) as scheduler:
            await scheduler.warm_up()
            alone, *many = await asyncio.gather(
                scheduler.embed(TEXTS), *(scheduler.embed([text + " again"]) for text in TEXTS)
            )
        np.testing.assert_allclose(alone.vectors, engine.encoder.encode(TEXTS), atol=1e-5)
        np.testing.assert_allclose(
            np.concatenate([answer.vectors for answer in many]),
            engine.encoder.encode([text + " again" for text in TEXTS]),
            atol=1e-5,
        )
        assert alone.num_tokens == sum(len(row) for row in engine.encoder.tokenize(TEXTS))

    asyncio.run(run())


def test_limits_are_those_of_the_model(engine):
    assert engine.max_tokens == 256 and engine.dim == 384
    assert len(engine.tokenize(["word " * 700])[0]) == 256
    assert len(engine.tokenize(["word " * 700], truncate=False)[0]) == 702


def test_prompts_are_those_of_the_model(minilm, tmp_path):
    encoder = Encoder.load(minilm)
    encoder.prompts = {"query": "find: "}
    engine = TorchEngine.load(encoder.save(tmp_path / "prompted"))
    assert engine.prompts == {"query": "find: "}
    assert np.array_equal(engine.tokenize(["x"], prompt="find: ")[0], engine.tokenize(["find: x"])[0])


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        TorchEngine.load(tmp_path)


def test_the_fake_engine_is_an_engine():
    fake: Engine = FakeEngine(dim=8, max_tokens=6, prompts={"query": "find "})
    rows = fake.tokenize(["a b", "a b c d e f g", "a b"], prompt="find ")
    assert [len(row) for row in rows] == [5, 6, 5]
    vectors = fake.forward(rows)
    assert vectors.dtype == np.float32 and vectors.shape == (3, 8)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1
