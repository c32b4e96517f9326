from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino
import pytest

from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.openvino_model import OpenVinoModel, converted, written

TEXTS = ["a", "rain in the mountains", "word " * 60, "naïve café — 数学", "two words", "   "]


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> Encoder:
    return Encoder.load(tiny_model)


@pytest.mark.parametrize(("pooling", "layers"), [("mean", None), ("cls", None), ("mean", [])])
def test_vectors_are_the_encoders_whatever_the_batch(
    pooling: str, layers: list[int] | None, tiny_model: Path, tmp_path: Path
):
    pooled = dataclasses.replace(Encoder.load(tiny_model, layers=layers), pooling=pooling)
    model, tokens = OpenVinoModel(converted(pooled), pooled, threads=1), pooled.tokenize(TEXTS)
    expected = pooled.encode(TEXTS)
    together = model.embed(tokens)
    assert together.dtype == np.float32 and model.dim == pooled.dim
    assert np.abs(together - expected).max() < 1e-5
    alone = np.concatenate([model.embed([row]).copy() for row in tokens])
    assert np.abs(alone - expected).max() < 1e-5
    assert np.abs(np.linalg.norm(together, axis=1) - 1).max() < 1e-6
    file = written(converted(pooled), tmp_path / "new" / "model.xml")
    np.testing.assert_allclose(OpenVinoModel(file, pooled, threads=1).embed(tokens), together, atol=1e-6)


def test_padding_does_not_matter(encoder: Encoder):
    """What stands in the padding does not matter."""
    tokens = encoder.tokenize(TEXTS)
    model = converted(encoder)
    others = [dataclasses.replace(encoder, tokenizer=SimpleNamespace(pad_token_id=pad)) for pad in (0, 7)]
    found = [OpenVinoModel(model, other, threads=1).embed(tokens) for other in others]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_what_was_returned_is_not_overwritten_by_the_next_batch(encoder: Encoder):
    model, tokens = OpenVinoModel(converted(encoder), encoder, threads=1), encoder.tokenize(TEXTS)
    first = model.embed(tokens[:2])
    kept = first.copy()
    model.embed(tokens[3:5])
    np.testing.assert_array_equal(first, kept)


def test_a_model_that_cannot_be_converted_names_the_way_out(encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such operation\nmore")

    monkeypatch.setattr(openvino, "convert_model", fails)
    with pytest.raises(
        InputError, match=r"cannot convert .*BertModel.*: no such operation; serve it with backend: torch"
    ):
        converted(encoder)
