"""Chunks: which rows go through a model together, so that little is padded."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Row = TypeVar("Row", bound=npt.NDArray[Any])

# Padded tokens per forward. A CPU is fastest while a chunk's activations stay in cache (MiniLM: 1,024 beats 4,096 by
# 1.35x in training and 1.1x in encoding, measured on 2 cores); a GPU wants to be filled.
BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
SIMILAR_LENGTH = 0.9  # where forwards follow each other, less padding is worth more of them
# Of workers that share chunks: a chunk costs this part of a full one beside its tokens (each backward adds to all
# gradients once), the busiest may have this much more than the mean, and to get there chunks are halved this often.
_COST_OF_A_CHUNK, _UNEVEN, _HALVINGS = 1 / 32, 1.03, 3


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


def dealt_chunks(
    lengths: npt.NDArray[Any], batch_tokens: int, workers: int, *, similar: float = 0.0
) -> list[list[tuple[int, npt.NDArray[np.int64]]]]:
    """Chunks of each worker, with their numbers among all chunks; a worker's own are longest first.

    They are the chunks that one worker would have, dealt so that all end together. Dealing rows first and cutting
    each worker's own pads more and cuts more often: of 768 short texts, two workers so computed 4 to 6 % more tokens
    than one, in 18 to 22 chunks instead of 15. Where whole chunks cannot be dealt evenly they are cut smaller.
    """
    best, least = [], float("inf")
    for halving in range(_HALVINGS + 1):
        chunks = length_sorted_chunks(lengths, max(1, batch_tokens >> halving), similar=similar)
        costs = [len(chunk) * int(lengths[chunk[0]]) + batch_tokens * _COST_OF_A_CHUNK for chunk in chunks]
        dealt = _evenly(costs, workers)
        busiest = max(sum(costs[i] for i in own) for own in dealt)
        if busiest < least:
            best, least = [[(i, chunks[i]) for i in own] for own in dealt], busiest
        if busiest * workers <= _UNEVEN * sum(costs):
            break
    return best


def _evenly(costs: Sequence[float], workers: int) -> list[list[int]]:
    """Places of `costs` that each worker gets, ascending: the dearest first, each to who has least so far."""
    dealt: list[list[int]] = [[] for _ in range(workers)]
    loads = [(0.0, worker) for worker in range(workers)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, worker = loads[0]
        dealt[worker].append(i)
        heapq.heapreplace(loads, (load + costs[i], worker))
    return [sorted(own) for own in dealt]


def vectors_in_chunks(
    tokens: Sequence[Row], dim: int, batch_tokens: int, forward: Callable[[list[Row]], npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """Vectors `[n, dim]` of tokenized texts, in the order given; `forward` gets chunks of similar lengths."""
    vectors = np.empty((len(tokens), dim), dtype=np.float32)
    lengths = np.array([len(row) for row in tokens], dtype=np.int64)
    for chunk in length_sorted_chunks(lengths, batch_tokens, similar=SIMILAR_LENGTH):
        vectors[chunk] = forward([tokens[i] for i in chunk])
    return vectors
