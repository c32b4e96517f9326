"""RayEncoder: the encoder pool as MTEB sees a model, for encoding and for search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mteb._create_dataloaders import create_dataloader
from mteb.models.abs_encoder import get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from mteb.types import PromptType

from gist_ray.evaluation.any_pool import AnyPool
from gist_ray.evaluation.encoder_actor import distinct
from gist_ray.evaluation.training_texts import Seen, TrainingTexts

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

_SLICE_DOCUMENTS = 250_000
"""Texts of a corpus that are in memory at a time. The pool drains at the end of each slice, so not too few."""


class RayEncoder:
    """Conforms to mteb's `EncoderProtocol` and `SearchProtocol`; the work is done on the actors of an `EncoderPool`.

    As a searcher it never holds the vectors of a corpus: actors embed parts of it and return the nearest of each.
    """

    def __init__(self, pool: AnyPool, name: str, revision: str, trained_on: TrainingTexts | None = None) -> None:
        """Wrap a pool.

        Args:
            pool: where texts are encoded.
            name: `org/model`, the model's name in the results.
            revision: content hash of the model. MTEB finds earlier results by name and revision alone, so two
                checkpoints with one revision would share scores.
            trained_on: texts that are counted in `seen` when they come by; None: they are not known.
        """
        self._pool = pool
        self._trained_on = trained_on
        self.seen: Seen = {}
        self._corpus: Any = None
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                # The enum: `create_empty` does not validate, and a string fails every similarity task.
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": pool.facts.dim,
                "max_tokens": pool.facts.max_tokens,
                "modalities": ["text"],
            }
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Vectors:
        """Vectors of all texts of a data loader, `[n, dim]` float32 of unit norm.

        The split, the subset and mteb's encode arguments (batch size, progress bar) do not change a vector.
        """
        texts = texts_of(inputs)
        self._count(hf_split, texts)
        return self._pool.encode(texts, self.prompt(task_metadata, prompt_type))

    def _count(self, part: str, texts: list[str]) -> None:
        if self._trained_on is not None:
            self._trained_on.count(self.seen, part, texts)

    def prompt(self, task_metadata: Any, prompt_type: Any) -> str:
        """The folder's prompt for a task: by task name, task type, then query or document; else none."""
        prompts = self._pool.facts.prompts
        name = get_prompt_name(prompts, task_metadata, prompt_type)
        return prompts[name] if name else ""

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of every pair, `[n, dim]` and `[m, dim]` to `[n, m]`."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of corresponding rows, `[n, dim]` twice to `[n]`."""
        return pairwise_cos_sim(embeddings1, embeddings2)

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Take a corpus, to be searched next."""
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: dict[str, list[str]] | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """The documents nearest to each query, `{query: {document: cosine}}`.

        Of the corpus given to `index`, or of the candidates `top_ranked` of each query.
        """
        corpus, self._corpus = self._corpus, None
        asked, keys = _documents(queries, task_metadata, PromptType.query), list(queries["id"])
        self._count("queries", asked)
        vectors = self._pool.encode(asked, self.prompt(task_metadata, PromptType.query))
        if top_ranked is not None:
            return self._rerank(vectors, keys, corpus, top_ranked, top_k, task_metadata)
        names = list(corpus["id"])
        places, scores = _merged(self._nearest(vectors, corpus, top_k, task_metadata), len(keys), top_k)
        return {
            key: {names[place]: score for place, score in zip(row.tolist(), cosines.tolist(), strict=True)}
            for key, row, cosines in zip(keys, places, scores, strict=True)
        }

    def _nearest(self, queries: Vectors, corpus: Any, most: int, task_metadata: Any) -> Iterator[tuple[Ids, Vectors]]:
        """Of part after part of a corpus: rows of the documents nearest to each query, and cosines."""
        prompt = self.prompt(task_metadata, PromptType.document)
        for start in range(0, len(corpus), _SLICE_DOCUMENTS):
            rows = corpus.select(range(start, min(start + _SLICE_DOCUMENTS, len(corpus))))
            documents = _documents(rows, task_metadata, PromptType.document)
            self._count("documents", documents)
            for places, scores in self._pool.nearest(queries, documents, prompt, most):
                yield start + places, scores

    def _rerank(
        self,
        queries: Vectors,
        keys: list[str],
        corpus: Any,
        candidates: dict[str, list[str]],
        most: int,
        task_metadata: Any,
    ) -> dict[str, dict[str, float]]:
        """Cosines of each query's candidates, the `most` best. Only documents that are candidates are embedded."""
        wanted = {name for key in keys for name in candidates.get(key, ())}
        kept = [i for i, name in enumerate(corpus["id"]) if name in wanted]
        rows = corpus.select(kept)
        documents = _documents(rows, task_metadata, PromptType.document)
        self._count("documents", documents)
        unique, places = distinct(documents)
        vectors = self._pool.encode(unique, self.prompt(task_metadata, PromptType.document))
        place = dict(zip(rows["id"], places.tolist(), strict=True))
        found: dict[str, dict[str, float]] = {}
        for key, query in zip(keys, queries, strict=True):
            ranked = candidates.get(key) or []
            cosines = vectors[[place[name] for name in ranked]] @ query
            best = np.argsort(-cosines, kind="stable")[:most]
            found[key] = {ranked[i]: float(cosines[i]) for i in best}
        return found


def texts_of(inputs: Iterable[dict[str, Any]]) -> list[str]:
    """All texts of a data loader of mteb."""
    return [text for batch in inputs for text in batch["text"]]


def _documents(rows: Any, task_metadata: Any, prompt_type: Any) -> list[str]:
    """Texts of a corpus or of queries, as mteb puts them together: titles, instructions, conversations."""
    return texts_of(create_dataloader(rows, task_metadata=task_metadata, prompt_type=prompt_type, batch_size=1024))


def _merged(parts: Iterable[tuple[Ids, Vectors]], queries: int, most: int) -> tuple[Ids, Vectors]:
    """The `most` best of all parts, best first, `[queries, k]` each. Of equal scores the first document is first.

    Which of several documents that are equal at the last place is kept is left open, as it is in mteb.
    """
    places, scores = np.zeros((queries, 0), np.int64), np.zeros((queries, 0), np.float32)
    for part_places, part_scores in parts:
        places, scores = np.hstack([places, part_places]), np.hstack([scores, part_scores])
        if places.shape[1] > most:
            kept = torch.topk(torch.from_numpy(scores), most, dim=1, sorted=False).indices.numpy()
            places, scores = np.take_along_axis(places, kept, 1), np.take_along_axis(scores, kept, 1)
    order = np.lexsort((places, -scores), axis=1)
    return np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1)
