"""One vector, four ways: sentence-transformers, Encoder, and the served model over HTTP in two encodings."""

import base64
import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conformance.served import KEY, MODEL_ID, Served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(verse_rows) -> list[str]:
    """200 real texts of 1 to far more than 256 tokens."""
    verses = [row["query"] for row in verse_rows]
    mixed = [verses[i] for i in range(140)]
    mixed += [" ".join(verses[i : i + 1 + i % 20]) for i in range(140, 190)]
    return [*mixed, *(verse[: 1 + i] for i, verse in enumerate(verses[190:200]))]


def test_every_way_gives_the_same_vectors(served: Served, model: Path, texts: list[str]):
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(model), device="cpu").encode(texts)
    lengths = [len(row) for row in served.encoder.tokenize(texts, truncate=False)]
    assert len(texts) == 200 and min(lengths) <= 4 and max(lengths) > 256

    np.testing.assert_allclose(served.encoder.encode(texts), expected, atol=1e-5)
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=60, trust_env=False) as client:
        for start in range(0, len(texts), 20):  # the queue of this endpoint is short
            some, vectors = texts[start : start + 20], expected[start : start + 20]
            for encoding in ("float", "base64"):
                body = {"model": MODEL_ID, "input": some, "encoding_format": encoding}
                rows = [item["embedding"] for item in client.post("/v1/embeddings", json=body).json()["data"]]
                if encoding == "base64":
                    rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
                np.testing.assert_allclose(np.array(rows), vectors, atol=1e-5)
            tei = client.post("/embed", content=json.dumps({"inputs": some}))
            np.testing.assert_allclose(np.array(tei.json()), vectors, atol=1e-5)
