"""Chunks: which rows go through a model together, so that little is padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Row = TypeVar("Row", bound=npt.NDArray[Any])

# Padded tokens per forward. A CPU is fastest while a chunk's activations stay in cache (MiniLM: 1,024 beats 4,096 by
# 1.35x in training and 1.1x in encoding, measured on 2 cores); a GPU wants to be filled.
BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
SIMILAR_LENGTH = 0.9  # where forwards follow each other, less padding is worth more of them


def length_sorted_chunks(
    lengths: npt.NDArray[Any], batch_tokens: int, *, similar: float = 0.0
) -> list[npt.NDArray[np.int64]]:
    """Cut indices, longest first, into chunks whose padded size (rows x longest) is at most `batch_tokens`.

    Longest first: the first chunk needs the most memory, so a run that fits at all fits from its first step on.
    A text longer than the budget makes a chunk of its own. A chunk with an eighth of the budget ends where rows are
    shorter than `similar` of its longest: more chunks, less padding (of 700 trivia texts at 0.9, 7 % instead of 16 %).
    """
    order = np.argsort(-lengths, kind="stable")
    descending = -lengths[order]
    chunks, start = [], 0
    while start < len(order):
        longest = max(1, -int(descending[start]))
        stop = min(len(order), start + max(1, batch_tokens // longest))
        shorter = start + int(np.searchsorted(descending[start:stop], -similar * longest, side="right"))
        if (shorter - start) * longest >= batch_tokens // 8:
            stop = shorter
        chunks.append(order[start:stop])
        start = stop
    return chunks


def vectors_in_chunks(
    tokens: Sequence[Row], dim: int, batch_tokens: int, forward: Callable[[list[Row]], npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """Vectors `[n, dim]` of tokenized texts, in the order given; `forward` gets chunks of similar lengths."""
    vectors = np.empty((len(tokens), dim), dtype=np.float32)
    lengths = np.array([len(row) for row in tokens], dtype=np.int64)
    for chunk in length_sorted_chunks(lengths, batch_tokens, similar=SIMILAR_LENGTH):
        vectors[chunk] = forward([tokens[i] for i in chunk])
    return vectors
