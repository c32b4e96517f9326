"""The real model behind the engine's seam."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from gist_ray.encoder import Encoder, TokenIds
from gist_ray.errors import InputError
from gist_ray.serving.engine import Engine, Vectors, load_engine
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.openvino_engine import OpenVinoEngine
from gist_ray.serving.scheduler import Scheduler
from gist_ray.serving.torch_engine import TorchEngine

SUBJECTS = ("a cat", "the committee", "rain in the mountains", "gene expression", "my grandmother's clock")
TEXTS = [" ".join([subject, "and"] * (1 + 3 * i % 17) + [f"number {i}"]) for i, subject in enumerate(SUBJECTS * 8)] + [
    "   ",
    "naïve café — 数学 🙂",
    "word " * 700,
]


@pytest.fixture(scope="module", params=["torch", "openvino"])
def engine(request, minilm) -> Iterator[Engine]:
    threads = torch.get_num_threads()
    yield load_engine(minilm, backend=request.param, threads=1)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder(minilm) -> Encoder:
    return Encoder.load(minilm)


def vectors_of(engine: Engine, tokens: Sequence[TokenIds]) -> Vectors:
    return engine.finish(engine.forward(tokens))


def test_threads_are_set_also_for_the_thread_of_the_forward(minilm):
    before = torch.get_num_threads()
    TorchEngine.load(minilm, threads=1)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert seen == [1]


def test_forward_equals_encode_whatever_the_batch(engine, encoder):
    expected = encoder.encode(TEXTS)
    tokens = engine.tokenize(TEXTS)
    together = vectors_of(engine, tokens)
    assert together.dtype == np.float32 and together.shape == (len(TEXTS), engine.dim)
    assert np.abs(together - expected).max() < 1e-5
    one_by_one = np.concatenate([vectors_of(engine, [row]).copy() for row in tokens[::7]])
    assert np.abs(one_by_one - expected[::7]).max() < 1e-5


def test_through_the_scheduler_among_others_equals_encode(engine, encoder):
    async def run() -> None:
        async with Scheduler(engine, batch_tokens=512, window_batches=3) as scheduler:
            await scheduler.warm_up()
            alone, *many = await asyncio.gather(
                scheduler.embed(TEXTS), *(scheduler.embed([text + " again"]) for text in TEXTS)
            )
        np.testing.assert_allclose(alone.vectors, encoder.encode(TEXTS), atol=1e-5)
        np.testing.assert_allclose(
            np.concatenate([answer.vectors for answer in many]),
            encoder.encode([text + " again" for text in TEXTS]),
            atol=1e-5,
        )
        assert alone.num_tokens == sum(len(row) for row in encoder.tokenize(TEXTS))

    asyncio.run(run())


def test_limits_are_those_of_the_model(engine):
    assert engine.max_tokens == 256 and engine.dim == 384
    assert len(engine.tokenize(["word " * 700])[0]) == 256
    assert len(engine.tokenize(["word " * 700], truncate=False)[0]) == 702


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_prompts_are_those_of_the_model(tiny_model, tmp_path, backend):
    encoder = Encoder.load(tiny_model)
    encoder.prompts = {"query": "find: "}
    engine = load_engine(encoder.save(tmp_path / "prompted"), backend=backend)
    assert engine.prompts == {"query": "find: "}
    assert np.array_equal(engine.tokenize(["x"], prompt="find: ")[0], engine.tokenize(["find: x"])[0])


def test_a_folder_without_a_model_is_refused(tmp_path):
    for backend in ("torch", "openvino"):
        with pytest.raises(InputError, match=r"config\.json is missing"):
            load_engine(tmp_path, backend=backend)


def test_auto_is_openvino_on_a_cpu_and_torch_where_it_is_missing(tiny_model, monkeypatch):
    assert isinstance(load_engine(tiny_model), OpenVinoEngine)
    monkeypatch.setattr("gist_ray.openvino_model.is_installed", lambda: False)
    assert isinstance(load_engine(tiny_model), TorchEngine)


@pytest.mark.parametrize(
    ("backend", "precision", "remedy"),
    [
        ("torch", "int8", "use the openvino backend"),
        ("torch", "bf16", "take fp32 or int8, or serve on a GPU"),
        ("auto", "fp16", "take fp32 or int8, or serve on a GPU"),
        ("openvino", "bf16", "in fp32 or int8"),
        ("openvino", "int8", "--int8 --texts FILE"),
        ("auto", "int8", "--int8 --texts FILE"),
    ],
)
def test_what_a_backend_cannot_compute_is_refused(tiny_model, backend, precision, remedy):
    with pytest.raises(InputError, match=remedy):
        load_engine(tiny_model, backend=backend, precision=precision)


def test_pieces_are_the_tokens_and_their_characters(engine):
    text = "  Unaffordable guitars!"
    (pieces,) = engine.pieces([text])
    assert [piece["id"] for piece in pieces] == engine.tokenize([text])[0].tolist()
    assert pieces[0]["special"] and pieces[-1]["special"] and pieces[0]["start"] is None
    words = [piece for piece in pieces if not piece["special"]]
    assert "".join(piece["text"] for piece in words) == "Unaffordableguitars!"
    assert all(text[piece["start"] : piece["stop"]] == piece["text"] for piece in words)
    assert engine.pieces([text], special=False) == [words]
    (prompted,) = engine.pieces(["x"], prompt="find ")
    assert [piece["text"] for piece in prompted][1:-1] == ["find", "x"] and prompted[2]["start"] == 5


def test_the_fake_engine_is_an_engine():
    fake: Engine = FakeEngine(dim=8, max_tokens=6, prompts={"query": "find "})
    rows = fake.tokenize(["a b", "a b c d e f g", "a b"], prompt="find ")
    assert [len(row) for row in rows] == [5, 6, 5]
    vectors = fake.finish(fake.forward(rows))
    assert vectors.dtype == np.float32 and vectors.shape == (3, 8)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1
