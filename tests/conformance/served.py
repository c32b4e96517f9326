"""What the tests of real clients ask, and what they should be answered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gist_ray.encoder import Encoder

KEY = "a-key-for-clients"
MODEL_ID = "org/minilm"
PROMPTS = {"query": "find: "}
MAX_QUEUE_TOKENS = 10_000
"""Little: a test can fill it with one request, which the model is then busy with for some seconds."""
TEXTS = [
    "How do I bake sourdough bread?",
    "Mix flour, water and a ripe starter;\nlet the dough rise overnight.",
    "Ein Satz mit Umlauten: Übermäßige Größe.",
    "日本語の文と emoji 🙂",
    'Quotes "inside", a back\\slash and a\ttab',
    "a",
    "far more words than the model reads " * 60,
    *(f"sentence number {number} of a longer list" for number in range(33)),
]


@dataclass(frozen=True)
class Served:
    """The endpoint and what it should answer.

    Attributes:
        url: root of the server; OpenAI clients take `{url}/v1`.
        encoder: the same model in this process.
        vectors: `encoder.encode(TEXTS)`.
    """

    url: str
    encoder: Encoder
    vectors: np.ndarray

    def agrees(self, vectors: object, texts: list[str] | None = None, prompt: str = "") -> None:
        """Assert that these are the model's vectors of `texts`; None: of TEXTS."""
        expected = self.vectors if texts is None else self.encoder.encode(texts, prompt=prompt)
        np.testing.assert_allclose(np.array(vectors), expected, atol=1e-5)
