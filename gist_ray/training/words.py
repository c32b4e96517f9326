"""Words: the word embeddings of a batch, looked up once for all of its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gist_ray.training.batch import Chunk


@contextmanager
def words_of(engine: Any, chunks: list[Chunk]) -> Iterator[BatchWords | None]:
    """Inside, the model takes its word embeddings from a table of those that `chunks` need.

    The gradient of an embedding is as large as its whole table, and each chunk's backward would fill one and add it:
    47 MB a chunk of all-MiniLM-L6-v2, 384 MB of a small multilingual model. Here chunks add to the small table, and
    `BatchWords.backward` passes it on once a batch.

    None, and nothing changes, where the embeddings are frozen, partitioned (ZeRO 3) or of an unknown kind.
    """
    embedding = engine.module.get_input_embeddings()
    if engine.zero_optimization_stage() == 3 or not _is_plain(embedding):
        yield None
        return
    words = BatchWords(engine, embedding, chunks)
    embedding.forward = words.look_up
    try:
        yield words
    finally:
        del embedding.forward  # the class's own again


class BatchWords:
    """Embeddings of the distinct tokens of a batch, `[words, dim]`."""

    def __init__(self, engine: Any, embedding: nn.Embedding, chunks: list[Chunk]) -> None:
        weight = embedding.weight
        self._engine, self._weight, self._padding = engine, weight, embedding.padding_idx
        self._tokens = torch.unique(torch.cat([chunk.ids.flatten() for chunk in chunks])).to(weight.device)
        self._places = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        self._places[self._tokens] = torch.arange(len(self._tokens), device=weight.device)
        self._rows = weight.detach()[self._tokens].requires_grad_()

    def look_up(self, ids: Tensor) -> Tensor:
        """Embeddings `[..., dim]` of token ids `[...]`, which must be of the batch."""
        return nn.functional.embedding(self._places[ids], self._rows)

    def backward(self) -> None:
        """Add the gradient that the chunks left to that of the model's own table."""
        if self._rows.grad is None:
            return
        rows = nn.functional.embedding(self._tokens, self._weight, padding_idx=self._padding)
        self._engine.backward((rows * self._rows.grad).sum(), scale_wrt_gas=False)


def _is_plain(embedding: Any) -> bool:
    """Whether an embedding is a trained table, and nothing more."""
    return (
        type(embedding) is nn.Embedding
        and embedding.weight.requires_grad
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
    )
