"""One vector, four ways: sentence-transformers, Encoder, and the served model over HTTP in two encodings."""

import base64
import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from gist_ray.encoder import Encoder
from gist_ray.serving.app import serve_model
from gist_ray.serving_config import ServingConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(verse_rows) -> list[str]:
    """200 real texts of 1 to far more than 256 tokens."""
    verses = [row["query"] for row in verse_rows]
    mixed = [verses[i] for i in range(140)]
    mixed += [" ".join(verses[i : i + 1 + i % 20]) for i in range(140, 190)]
    return [*mixed, *(verse[: 1 + i] for i, verse in enumerate(verses[190:200]))]


def test_every_way_gives_the_same_vectors(minilm: Path, texts: list[str], tmp_path: Path, ray_session):
    from sentence_transformers import SentenceTransformer

    folder = Encoder.load(minilm, layers=[0, 2, 4]).save(tmp_path / "model")
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts)
    lengths = [len(row) for row in Encoder.load(folder).tokenize(texts, truncate=False)]
    assert len(texts) == 200 and min(lengths) <= 4 and max(lengths) > 256

    np.testing.assert_allclose(Encoder.load(folder).encode(texts), expected, atol=1e-5)
    with serve_model(folder, ServingConfig(port=0)) as endpoint, httpx.Client(timeout=60, trust_env=False) as client:
        for encoding in ("float", "base64"):
            body = {"model": endpoint.model_id, "input": texts, "encoding_format": encoding}
            answer = client.post(f"{endpoint.url}/v1/embeddings", json=body)
            rows = [item["embedding"] for item in answer.json()["data"]]
            if encoding == "base64":
                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            np.testing.assert_allclose(np.array(rows), expected, atol=1e-5)
        tei = client.post(f"{endpoint.url}/embed", content=json.dumps({"inputs": texts}))
        np.testing.assert_allclose(np.array(tei.json()), expected, atol=1e-5)
