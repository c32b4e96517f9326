"""Mining: which text becomes the positive and which the negatives of a query. Pure: no I/O, no Ray.

Labelled texts follow GISTEmbed (arXiv 2402.16829): the positive is drawn among the most similar texts of the same
label, the negative uniformly from the other labels. Hard negatives follow NV-Retriever (arXiv 2407.15831): the most
similar candidates, without those that come too near to the positive's own similarity.

Randomness is a hash of the seed and the texts concerned, so a draw depends neither on the order of the rows nor on who
computes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Similarities = npt.NDArray[np.float32]

NONE = -1  # "no text" where a text's number is expected


# Randomness ----------------------------------------------------------------------------------------------------------


def mixed(state: Hashes, value: Hashes | int) -> Hashes:
    """Hash of a state and one more value, elementwise: two rounds of splitmix64's finaliser."""
    value = np.asarray(value, dtype=np.uint64)
    return _finalised(np.atleast_1d(state) + np.uint64(0x9E3779B97F4A7C15) + _finalised(np.atleast_1d(value)))


def uniforms(hashes: Hashes) -> npt.NDArray[np.float64]:
    """Hashes as numbers in [0, 1), 53 bits each."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalised(x: Hashes) -> Hashes:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Search --------------------------------------------------------------------------------------------------------------


def nearest(
    queries: Tensor, tiles: Iterable[tuple[int, Tensor]], k: int, hide: Callable[[Tensor, int], None]
) -> tuple[Similarities, Ids]:
    """The `k` most similar candidates of each query, exactly: similarities and places, both `[q, k]`, best first.

    `queries [q, dim]` and the candidates are unit vectors. `tiles` yields (place of the first candidate, candidates
    `[n, dim]`); `hide` gets the similarities `[q, n]` and that place, and sets to -inf what must not be found. Where
    fewer than `k` are left, the similarity is -inf and the place NONE. Memory: `q x n` of one tile.
    """
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)
    places = torch.full((len(queries), k), NONE, device=queries.device)
    for start, candidates in tiles:
        similarity = queries @ candidates.T
        hide(similarity, start)
        values, columns = similarity.topk(min(k, len(candidates)))
        best, kept = torch.cat([best, values], 1).topk(k)
        places = torch.cat([places, columns + start], 1).gather(1, kept)
    places[best == -torch.inf] = NONE
    return best.cpu().numpy(), places.cpu().numpy()


def rescored(queries: Similarities, candidates: Similarities, place: Ids) -> npt.NDArray[np.float64]:
    """Cosines of each query with its candidates in float64, `[q, k]`.

    `queries [q, dim]`, `candidates [n, dim]`, `place [q, k]` rows of `candidates`, or NONE, whose cosine is -inf. What
    tiles of fp32 found is weighed here without their rounding, so that probabilities and margins do not depend on how
    a matrix product was split, and equal vectors have equal cosines.
    """
    wide, query = candidates.astype(np.float64), queries.astype(np.float64)
    for vectors in (wide, query):
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if not len(wide):
        return np.full(place.shape, -np.inf)
    return np.where(place == NONE, -np.inf, np.einsum("qd,qkd->qk", query, wide[place]))


# Choice --------------------------------------------------------------------------------------------------------------


def softmax(similarity: npt.NDArray[np.floating[Any]], temperature: float) -> npt.NDArray[np.float64]:
    """Row by row softmax of similarity / temperature, `[q, k]` in float64. Of -inf alone comes a row of zeros."""
    scaled = similarity.astype(np.float64) / temperature
    top = scaled.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(scaled - np.where(np.isfinite(top), top, 0))
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return weights


def drawn(probabilities: npt.NDArray[np.float64], uniform: npt.NDArray[np.float64]) -> Ids:
    """Column of each row by inverse CDF, `[q]`; NONE for a row of zeros.

    `probabilities [q, k]` descend along the row, so those of zero stand last; `uniform [q]` is in [0, 1).
    """
    cumulative = np.cumsum(probabilities, axis=1)
    column = (cumulative <= (uniform * cumulative[:, -1])[:, None]).sum(axis=1)
    last = (probabilities > 0).sum(axis=1) - 1
    return np.asarray(np.minimum(column, last))  # rounding must not step past the last


def distinct_numbers(available: Ids, uniform: npt.NDArray[np.float64]) -> Ids:
    """For each row, distinct numbers below `available [q]`, uniformly, in the order drawn: `[q, count]`.

    `uniform [q, count]` is in [0, 1). Where fewer are available the rest is NONE. The j-th number is drawn among those
    left and moved past the earlier ones, so nothing is drawn twice or again. The bias of 53 bits is below
    available / 2^53.
    """
    count = uniform.shape[1]
    numbers = np.full(uniform.shape, NONE, dtype=np.int64)
    for j in range(count):
        left = available - j
        number = (uniform[:, j] * left).astype(np.int64)
        for earlier in np.sort(numbers[:, :j], axis=1).T:
            number += number >= earlier
        numbers[:, j] = np.where(left > 0, number, NONE)
    return numbers


def margin_limit(positive: npt.NDArray[np.float64], margin: float) -> npt.NDArray[np.float64]:
    """Similarity that a hard negative must stay below: g(q, p) - margin * |g(q, p)|, elementwise."""
    return positive - margin * np.abs(positive)


def chosen(allowed: npt.NDArray[np.bool_], order: Hashes | None, count: int) -> Ids:
    """Up to `count` allowed columns of each row, `[q, count]`; NONE where fewer are allowed.

    `allowed [q, k]`. Those of the lowest `order [q, k]`, which is a uniform draw without replacement if `order` is a
    hash; None takes the first ones.
    """
    rank = np.arange(allowed.shape[1]) if order is None else order.argsort(axis=1, kind="stable").argsort(axis=1)
    rank = np.where(allowed, rank, allowed.shape[1])
    columns = rank.argsort(axis=1, kind="stable")[:, :count]
    found = np.where(np.take_along_axis(allowed, columns, axis=1), columns, NONE)
    return np.pad(found, ((0, 0), (0, count - found.shape[1])), constant_values=NONE)


# Indexes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelIndex:
    """Labelled texts in the order that mining wants. O(rows) integers; a label belongs to one task."""

    text: Ids
    """`[entries]` text ids. An entry is one text under one label, however many rows say so; ordered by label, then by
    text id."""
    label: Ids
    """`[entries]`."""
    label_starts: Ids
    """`[labels + 1]`: entries of label i are `label_starts[i]:label_starts[i + 1]`."""
    label_task: Ids
    """`[labels]`, ascending."""
    corpus: Ids
    """`[texts]` text ids: each text of a task once, under its first label; ordered as the entries."""
    corpus_label: Ids
    """`[texts]` that first label."""
    also_label: Ids
    """`[also]` further labels of texts that have several; ordered by label, then place."""
    also_place: Ids
    """`[also]` the place of that text in `corpus`."""

    @classmethod
    def of(cls, label: Ids, text: Ids, label_task: Ids) -> LabelIndex:
        """Index rows of (label, text), in any order and with repetitions."""
        text, label = _distinct(label, text)[::-1]
        by_text = np.lexsort((label, text, label_task[label]))
        first = np.ones(len(text), dtype=bool)
        task_sorted, text_sorted = label_task[label][by_text], text[by_text]
        first[1:] = (task_sorted[1:] != task_sorted[:-1]) | (text_sorted[1:] != text_sorted[:-1])
        represented = np.empty(len(text), dtype=np.int64)
        represented[by_text] = by_text[np.flatnonzero(first)[np.cumsum(first) - 1]]
        in_corpus = represented == np.arange(len(text))
        also_label, also_place = label[~in_corpus], (np.cumsum(in_corpus) - 1)[represented[~in_corpus]]
        also = np.lexsort((also_place, also_label))
        starts = np.searchsorted(label, np.arange(len(label_task) + 1))
        return cls(
            text, label, starts, label_task, text[in_corpus], label[in_corpus], also_label[also], also_place[also]
        )

    def corpus_range(self, label: int) -> tuple[int, int]:
        """Where the corpus of a label's task starts and stops."""
        task = self.label_task[label]
        start, stop = self._own_starts[np.searchsorted(self.label_task, [task, task + 1])].tolist()
        return start, stop

    def others(self, label: Ids, uniform: npt.NDArray[np.float64]) -> Ids:
        """Distinct texts of the same task that do not carry the label, uniformly: `[q, count]` text ids or NONE.

        `label [q]` is of one task; `uniform [q, count]` is in [0, 1). Index arithmetic without rejection, so it cannot
        hang: a number among the texts that remain is moved past the texts that carry the label beside their first
        one, then past the label's own range.
        """
        start, stop = self.corpus_range(int(label[0]))
        own, own_stop = self._own_starts[label][:, None], self._own_starts[label + 1][:, None]
        number = distinct_numbers(stop - start - (self.label_starts[label + 1] - self.label_starts[label]), uniform)
        upto = np.searchsorted(self._also_keys, label[:, None] * (len(self.corpus) + 1) + number, side="right")
        place = start + number + upto - np.searchsorted(self.also_label, label)[:, None]
        place += np.where(place >= own, own_stop - own, 0)
        return np.where(number == NONE, NONE, self.corpus[np.where(number == NONE, 0, place)])

    @cached_property
    def _own_starts(self) -> Ids:
        """`[labels + 1]`: `corpus` holds the texts whose first label is i from `_own_starts[i]` to the next."""
        return np.searchsorted(self.corpus_label, np.arange(len(self.label_task) + 1))

    @cached_property
    def _also_keys(self) -> Ids:
        """For each `also`: its label, and the number from which on a text that remains stands behind it; ascending."""
        task_starts = np.searchsorted(self.label_task, self.label_task[self.also_label])
        # Not shifted by the label's own range: a text stands under its first label, so before the ranges of the others.
        place = self.also_place - self._own_starts[task_starts]
        earlier = np.arange(len(place)) - np.searchsorted(self.also_label, self.also_label)
        keys: Ids = self.also_label * (len(self.corpus) + 1) + place - earlier
        return keys


@dataclass(frozen=True)
class PairIndex:
    """Pairs in the order that mining wants. O(rows) integers."""

    query: Ids
    """`[pairs]` text ids; distinct pairs of a task, ordered by task, query, positive."""
    positive: Ids
    """`[pairs]`."""
    task: Ids
    """`[pairs]`."""
    corpus: Ids
    """`[candidates]` text ids: every positive and every given negative of a task once, ascending within the task."""
    corpus_task: Ids
    """`[candidates]`, ascending."""
    known_query: Ids
    """`[known]` queries and their positives over all tasks, which are never each other's negatives; ordered."""
    known_positive: Ids
    """`[known]`."""

    @classmethod
    def of(cls, query: Ids, positive: Ids, task: Ids, candidate: Ids, candidate_task: Ids) -> PairIndex:
        """Index rows of (query, positive) and given negatives, in any order and with repetitions."""
        task, query, positive = _distinct(task, query, positive)
        tasks, corpus = np.concatenate([task, candidate_task]), np.concatenate([positive, candidate])
        corpus_task, corpus = _distinct(tasks, corpus)
        return cls(query, positive, task, corpus, corpus_task, *_distinct(query, positive))

    def never(self, query: Ids, task: int) -> tuple[Ids, Ids]:
        """What is hidden from ascending distinct queries: (number of the query, place in the task's corpus).

        The query itself and all its known positives, ordered by place.
        """
        first, last = (np.searchsorted(self.known_query, query, side=side) for side in ("left", "right"))
        of = np.repeat(np.arange(len(query)), last - first)
        within = np.arange(len(of)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
        of = np.concatenate([of, np.arange(len(query))])
        text = np.concatenate([self.known_positive[first[of[: len(within)]] + within], query])
        start, stop = np.searchsorted(self.corpus_task, [task, task + 1])
        corpus = self.corpus[start:stop]
        place = np.searchsorted(corpus, text)
        there = corpus[np.minimum(place, len(corpus) - 1)] == text
        order = np.argsort(place[there], kind="stable")
        return of[there][order], place[there][order]


def cut(groups: Ids, size: int) -> Ids:
    """Ranges `[tiles, 2]` of at most `size` neighbours of the same group; `groups [n]` ascends."""
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1)).tolist()
    tiles = [
        (low, min(low + size, stop))
        for start, stop in itertools.pairwise([*starts, len(groups)])
        for low in range(start, stop, size)
    ]
    return np.array(tiles, dtype=np.int64).reshape(-1, 2)


def _distinct(*columns: Ids) -> tuple[Ids, ...]:
    """Distinct rows of some columns, ordered by the first, then the next."""
    order = np.lexsort(columns[::-1])
    ordered = [column[order] for column in columns]
    new = np.ones(len(order), dtype=bool)
    if len(order):
        new[1:] = np.any([column[1:] != column[:-1] for column in ordered], axis=0)
    return tuple(column[new] for column in ordered)
