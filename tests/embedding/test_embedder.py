from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.embed_config import VectorConfig
from gist_ray.embedding.embedder import TextEmbedder, null_row
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.serving.answers import as_type
from gist_ray.serving.fake_engine import FakeEngine

WORDS = st.lists(st.sampled_from(["a", "bb", "see", "very long words"]), min_size=1, max_size=9).map(" ".join)


def embedder(**settings) -> TextEmbedder:
    """Of a fake engine, whose vector of a text depends on that text alone."""
    engine = FakeEngine(dim=12, max_tokens=8, prompts={"query": "find "})
    return TextEmbedder(engine, VectorConfig(model="fake", **settings))


@pytest.fixture(scope="module")
def texts(verse_rows) -> list[str]:
    verses = [row["query"] for row in verse_rows[:20]]
    return [*verses, " ".join(verses), "x", "naïve café — 数学 🙂"]


@pytest.mark.parametrize(("backend", "model"), [("torch", "minilm"), ("openvino", "tiny_model")])
def test_vectors_are_those_of_the_encoder(request, texts: list[str], backend: str, model: str):
    folder, threads = request.getfixturevalue(model), torch.get_num_threads()
    rows, cut = TextEmbedder.load(VectorConfig(model=str(folder), backend=backend), threads=2).embed(texts)
    torch.set_num_threads(threads)
    encoder = Encoder.load(folder)
    assert rows.dtype == np.float32 and rows.shape == (len(texts), encoder.dim)
    np.testing.assert_allclose(rows, encoder.encode(texts), atol=1e-5)
    assert cut == sum(len(row) > encoder.max_tokens for row in encoder.tokenize(texts, truncate=False)) > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_texts_is_that_of_rows(texts: list[str], random):
    rows, cut = embedder(batch_tokens=16).embed(texts)
    order = list(range(len(texts)))
    random.shuffle(order)
    again, cut_again = embedder(batch_tokens=40).embed([texts[i] for i in order])
    np.testing.assert_array_equal(again, rows[order])
    assert cut == cut_again == sum(len(text.split()) + 2 > 8 for text in texts)


def test_dimensions_are_cut_and_at_unit_length_again():
    whole, _ = embedder().embed(["a b", "c"])
    short, _ = embedder(dimensions=5).embed(["a b", "c"])
    np.testing.assert_allclose(short, whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    with pytest.raises(InputError, match="dimensions 13 is above the 12 of fake"):
        embedder(dimensions=13)


@pytest.mark.parametrize(
    ("dtype", "stored", "width"),
    [("float32", "<f4", 12), ("float16", "<f2", 12), ("int8", "|i1", 12), ("binary", "|i1", 2), ("ubinary", "|u1", 2)],
)
def test_types(dtype: str, stored: str, width: int):
    rows, _ = embedder(dtype=dtype).embed(["a b", "c", "d e f"])
    assert rows.dtype.str == stored and rows.shape == (3, width)
    floats, _ = embedder().embed(["a b", "c", "d e f"])
    if dtype == "float16":
        np.testing.assert_allclose(rows, floats, atol=1e-3)
    else:
        np.testing.assert_array_equal(rows, as_type(floats, "float" if dtype == "float32" else dtype))
    none, cut = embedder(dtype=dtype).embed([])
    assert none.shape == (0, width) and none.dtype == rows.dtype and cut == 0


def test_a_prompt_goes_before_the_text():
    named, _ = embedder(prompt_name="query").embed(["a b"])
    given_in_full, _ = embedder(prompt="find ").embed(["a b"])
    as_text, _ = embedder().embed(["find a b"])
    np.testing.assert_array_equal(named, as_text)
    np.testing.assert_array_equal(given_in_full, as_text)
    assert embedder(prompt_name="query").embed(["a b c d e f"])[1] == 1  # 6 words and 2 fit, a prompt more does not
    with pytest.raises(InputError, match="no prompt named passage; it has query"):
        embedder(prompt_name="passage")
    with pytest.raises(ValueError, match="not both"):
        VectorConfig(model="m", prompt="a", prompt_name="b")


def test_a_broken_model_is_named(tmp_path: Path):
    class Broken(FakeEngine):
        def finish(self, result):
            return super().finish(result) * np.nan

    with pytest.raises(InputError, match=r"broken gives no vector .* for the text 'a'"):
        TextEmbedder(Broken(dim=4, max_tokens=8), VectorConfig(model="broken")).embed(["a"])


def test_only_floats_have_a_number_for_a_missing_vector():
    assert np.isnan(null_row("float16", 3)).all()
    with pytest.raises(InputError, match="int8 has no number for a missing vector"):
        null_row("int8", 3)
