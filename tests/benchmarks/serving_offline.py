"""The peer without a server."""

from __future__ import annotations

import time


class Offline:
    """`SentenceTransformer.encode`, batch 32, both cores."""

    def __init__(self, rank: int, size: int, model: str, texts: list[str]) -> None:
        from sentence_transformers import SentenceTransformer

        self._model, self._texts = SentenceTransformer(model, device="cpu"), texts

    def __call__(self) -> float:
        started = time.perf_counter()
        self._model.encode(self._texts, batch_size=32, show_progress_bar=False)
        return len(self._texts) / (time.perf_counter() - started)
