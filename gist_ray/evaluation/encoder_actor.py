"""EncoderActor: a model in a worker process, which embeds texts and says which of them are nearest to queries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gist_ray.chunks import vectors_in_chunks
from gist_ray.encoder import TokenIds
from gist_ray.errors import InputError
from gist_ray.evaluation.cost import Cost
from gist_ray.evaluation.embedding_cache import EmbeddingCache
from gist_ray.evaluation.prometheus import TextCounts
from gist_ray.serving_config import Precision

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

_SIMILARITIES = 1 << 24  # numbers of a tile of similarities: 64 MB


@dataclass(frozen=True)
class ActorSettings:
    """What an actor needs to start, again if its process dies."""

    model: str
    """Model folder on storage that every node sees, or Hub id."""
    threads: int
    device: str
    precision: Precision
    batch_tokens: int
    """Padded tokens per forward."""
    cache_dir: str | None = None
    """Folder for vectors, on each node or on shared storage. None: nothing is kept."""
    cache_bytes: int = 0
    made_from: dict[str, Any] | None = None
    """Everything that decides a vector, the prompt aside."""
    name: str = ""
    """Of the model, for who counts its texts."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model once it is loaded."""

    dim: int
    max_tokens: int
    prompts: dict[str, str]


class EncoderActor:
    """What runs in a Ray actor. One call at a time.

    An error in a Ray constructor reaches nobody as what it is, so one in loading is kept for who asks for the facts.
    """

    def __init__(self, settings: ActorSettings) -> None:
        from gist_ray.serving.engine import load_engine

        self._settings = settings
        self._caches: dict[str, EmbeddingCache] = {}
        self._counts = TextCounts(settings.name)
        self._error: InputError | None = None
        try:
            self._engine = load_engine(
                settings.model, precision=settings.precision, threads=settings.threads, device=settings.device
            )
        except InputError as error:
            self._error = error

    def facts(self) -> ModelFacts:
        """Of the loaded model.

        Raises:
            InputError: it could not be loaded.
        """
        if self._error is not None:
            raise self._error
        return ModelFacts(self._engine.dim, self._engine.max_tokens, dict(self._engine.prompts))

    def encode(self, texts: list[str], prompt: str) -> tuple[Vectors, Cost]:
        """Vectors of distinct texts, `[n, dim]` float32 of unit norm, in order; those in the cache from there."""
        started, cache = time.perf_counter(), self._cache(prompt)
        vectors = np.empty((len(texts), self._engine.dim), dtype=np.float32)
        new = np.ones(len(texts), dtype=bool)
        if cache is not None:
            known, kept = cache.get(texts)
            vectors[known], new[known] = kept, False
        places = np.flatnonzero(new)
        unknown = [texts[i] for i in places]
        tokens = self._engine.tokenize(unknown, prompt=prompt)
        vectors[places] = vectors_in_chunks(tokens, self._engine.dim, self._settings.batch_tokens, self._forward)
        if cache is not None:
            cache.put(unknown, vectors[places])
        cached, seconds = len(texts) - len(unknown), time.perf_counter() - started
        self._counts.embedded(computed=len(unknown), cached=cached)
        return vectors, Cost(distinct=len(texts), cached=cached, encode_s=seconds)

    def nearest(self, texts: list[str], prompt: str, queries: Vectors, most: int) -> tuple[tuple[Ids, Vectors], Cost]:
        """Places and cosines of the `most` texts nearest to each of `queries [n, dim]`, best first, `[n, k]` each.

        Texts need not be distinct; k is `most`, or the number of texts. Vectors stay here.
        """
        unique, places = distinct(texts)
        vectors, spent = self.encode(unique, prompt)
        started = time.perf_counter()
        found = nearest(queries, vectors[places], most)
        spent.add(Cost(encode_s=time.perf_counter() - started))
        return found, spent

    def _forward(self, tokens: list[TokenIds]) -> Vectors:
        return self._engine.finish(self._engine.forward(tokens))

    def _cache(self, prompt: str) -> EmbeddingCache | None:
        made_from = self._settings.made_from
        if self._settings.cache_dir is None or made_from is None:
            return None
        if prompt not in self._caches:
            self._caches[prompt] = EmbeddingCache(
                Path(self._settings.cache_dir),
                {**made_from, "prompt": prompt, "precision": self._engine.precision},
                self._engine.dim,
                limit_bytes=self._settings.cache_bytes,
            )
        return self._caches[prompt]


def nearest(queries: Vectors, vectors: Vectors, most: int) -> tuple[Ids, Vectors]:
    """Rows of `vectors [m, dim]` with the greatest dot products with each of `queries [n, dim]`, and those products.

    Best first, `[n, min(most, m)]` each. A tile of similarities is held at a time, never all.
    """
    import torch

    kept = min(most, len(vectors))
    places, scores = np.empty((len(queries), kept), np.int64), np.empty((len(queries), kept), np.float32)
    matrix, tile = torch.from_numpy(vectors).T, max(1, _SIMILARITIES // max(1, len(vectors)))
    for start in range(0, len(queries), tile):
        best = torch.topk(torch.from_numpy(queries[start : start + tile]) @ matrix, kept, dim=1)
        places[start : start + tile], scores[start : start + tile] = best.indices.numpy(), best.values.numpy()
    return places, scores


def distinct(texts: Sequence[str]) -> tuple[list[str], Ids]:
    """Distinct texts in order of first appearance, and the place among them of each text, `[n]`."""
    place: dict[str, int] = {}
    places = np.fromiter((place.setdefault(text, len(place)) for text in texts), np.int64, len(texts))
    return list(place), places
