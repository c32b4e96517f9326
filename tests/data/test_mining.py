"""The maths of mining against plain float64 and set arithmetic."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.data.mining import (
    NONE,
    LabelIndex,
    PairIndex,
    chosen,
    cut,
    distinct_numbers,
    drawn,
    margin_limit,
    mixed,
    nearest,
    rescored,
    softmax,
    uniforms,
)
from gist_ray.encoder import Encoder

SEEDS = 2000


def tail_probability(statistic: float, freedom: int) -> float:
    """P(chi-square with `freedom` degrees >= statistic)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def g_test(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """G statistic and degrees of freedom; cells with fewer than five expected are pooled."""
    expected = probabilities * counts.sum()
    big = expected >= 5
    seen = np.append(counts[big], counts[~big].sum())
    wanted = np.append(expected[big], expected[~big].sum())
    assert not seen[wanted == 0].any()
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    terms = np.where(seen > 0, seen * np.log(np.maximum(seen, 1) / wanted), 0)
    return float(2 * terms.sum()), len(seen) - 1


def unit_vectors(n: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def tiles(vectors: np.ndarray, size: int):
    return ((start, torch.from_numpy(vectors[start : start + size])) for start in range(0, len(vectors), size))


# Randomness ----------------------------------------------------------------------------------------------------------


def test_hashes_are_even_and_independent_of_each_other():
    state = mixed(np.arange(20_000, dtype=np.uint64), 7)
    first, second = uniforms(mixed(state, 1)), uniforms(mixed(state, 2))
    for sample in (first, second, (first + second) % 1, (first + np.roll(first, 1)) % 1):
        assert ((sample >= 0) & (sample < 1)).all()
        counts = np.bincount((sample * 100).astype(int), minlength=100)
        assert tail_probability(*g_test(counts, np.full(100, 0.01))) > 1e-3
    assert len(np.unique(state)) == len(state)


def test_hashes_keep_their_values():
    """Pinned: another value would silently give another data set for the same seed."""
    assert mixed(np.array([0], np.uint64), 0).tolist() == [0xE220A8397B1DCDAF]  # splitmix64, seed 0, first output
    assert mixed(np.array([1029], np.uint64), np.array([5, 6], np.uint64)).tolist() == [
        12115378848950802412,
        1803658711152154269,
    ]
    assert mixed(np.array([[1], [2]], np.uint64), np.arange(3, dtype=np.uint64)).shape == (2, 3)
    assert uniforms(np.array([0, 2**64 - 1], np.uint64)).tolist() == [0.0, 1 - 2.0**-53]


def test_the_order_of_what_is_mixed_matters():
    a, b = np.array([3], np.uint64), np.array([9], np.uint64)
    assert mixed(mixed(a, 0), b) != mixed(mixed(b, 0), a)


# Search --------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 45), st.integers(0, 3))
def test_nearest_is_the_whole_sorted_list_cut_at_k(candidates: int, size: int, k: int, seed: int):
    queries, corpus = unit_vectors(5, 8, seed), unit_vectors(candidates, 8, seed + 10)
    hidden = np.random.default_rng(seed).random((5, candidates)) < 0.3

    def hide(similarity: Any, start: int) -> None:
        similarity[torch.from_numpy(hidden[:, start : start + similarity.shape[1]])] = -torch.inf

    similarity, place = nearest(torch.from_numpy(queries), tiles(corpus, size), k, hide)
    exact = queries.astype(np.float64) @ corpus.astype(np.float64).T
    for row in range(5):
        left = np.flatnonzero(~hidden[row])
        expected = left[np.argsort(-exact[row, left], kind="stable")][:k]
        assert place[row].tolist() == [*expected, *[NONE] * (k - len(expected))]
        np.testing.assert_allclose(similarity[row, : len(expected)], exact[row, expected], atol=1e-6)
        assert (similarity[row, len(expected) :] == -np.inf).all()


# The paper's positives -----------------------------------------------------------------------------------------------


def papers_probabilities(vectors: np.ndarray, labels: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """GISTEmbed's procedure, directly: float64 cosines of all with all, no self, the top k of the same label."""
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    cosine = exact @ exact.T
    out = np.zeros_like(cosine)
    for query in range(len(labels)):
        same = [i for i in range(len(labels)) if labels[i] == labels[query] and i != query]
        top = sorted(same, key=lambda i: -cosine[query, i])[:k]
        weights = np.exp((cosine[query, top] - cosine[query, top].max(initial=-1)) / temperature)
        out[query, top] = weights / weights.sum()
    return out


def check_positives(vectors: np.ndarray, labels: np.ndarray, k: int) -> None:
    reference = papers_probabilities(vectors, labels, k, 0.05)
    queries = torch.from_numpy(vectors)
    label = torch.from_numpy(labels)

    def hide(similarity: Any, start: int) -> None:
        stop = start + similarity.shape[1]
        similarity[label[:, None] != label[None, start:stop]] = -torch.inf
        similarity[torch.arange(start, stop), torch.arange(stop - start)] = -torch.inf

    similarity, place = nearest(queries, tiles(vectors, 128), k, hide)
    cosine = rescored(vectors, vectors, place)
    np.testing.assert_allclose(similarity, cosine, atol=1e-6)
    probabilities = softmax(cosine, 0.05)
    ours = np.zeros_like(reference)
    np.put_along_axis(ours, np.where(place == NONE, 0, place), probabilities, axis=1)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.sum(axis=1), (reference.sum(axis=1) > 0).astype(float), atol=1e-12)

    counts = np.zeros(reference.shape, dtype=np.int64)
    rows = np.arange(len(labels))
    texts = mixed(np.arange(len(labels), dtype=np.uint64), 0)
    for seed in range(SEEDS):
        column = drawn(probabilities, uniforms(mixed(texts, seed)))
        taken = column != NONE
        np.add.at(counts, (rows[taken], place[taken, column[taken]]), 1)
    tests = [g_test(counts[i], reference[i]) for i in rows if reference[i].any()]
    statistic, freedom = (sum(column) for column in zip(*tests, strict=True))
    assert tail_probability(statistic, freedom) > 1e-3
    alone = np.array([tail_probability(*test) for test in tests if test[1]])
    assert (alone < 1e-2).mean() < 0.03 and alone.min() > 1e-3 / len(alone)


def test_positives_follow_the_papers_distribution_on_verses(tiny_model: Path, verse_rows):
    texts = list(dict.fromkeys(row["query"] for row in verse_rows))[:180]
    vectors = Encoder.load(tiny_model).encode(texts)
    labels = np.array([min(len(text) // 40, 3) for text in texts])
    labels[-1] = 99  # alone under its label
    check_positives(vectors, labels, k=20)


def test_positives_follow_the_papers_distribution_on_banking77(minilm: Path, shared: Path):
    with gzip.open(shared / "data/eval/Banking77Classification/train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    label_of = {row["text"]: row["label"] for row in rows if row["label"] in (6, 15, 28, 72)}
    texts = list(label_of)[:500]
    labels = np.array([label_of[text] for text in texts])
    assert len(texts) == 500 and np.bincount(labels).max() > 150  # the cut at the 100 most similar bites
    check_positives(Encoder.load(minilm).encode(texts), labels, k=100)


def test_a_draw_never_takes_what_has_no_probability():
    probabilities = np.array([[0.6, 0.4, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert drawn(probabilities, np.array([1 - 2.0**-53] * 3)).tolist() == [1, NONE, 0]
    assert drawn(probabilities, np.zeros(3)).tolist() == [0, NONE, 0]
    assert drawn(probabilities, np.array([0.59, 0.5, 0.5])).tolist() == [0, NONE, 0]
    assert drawn(probabilities, np.array([0.61, 0.5, 0.5])).tolist() == [1, NONE, 0]
    assert (softmax(np.full((2, 3), -np.inf, np.float32), 0.05) == 0).all()
    assert softmax(np.array([[1.0, -1.0, -np.inf]], np.float32), 1e-4).tolist() == [[1.0, 0.0, 0.0]]


# Negatives -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_distinct_numbers_are_distinct_and_below(available: list[int], count: int, random: Any):
    uniform = np.array([[random.random() for _ in range(count)] for _ in available])
    for row, n in zip(distinct_numbers(np.array(available), uniform), available, strict=True):
        found = row[row != NONE]
        assert len(found) == min(n, count) == len(set(found.tolist()))
        assert ((found >= 0) & (found < n)).all()
        assert (row[: len(found)] != NONE).all()


def test_distinct_numbers_reach_every_order_equally():
    grid = np.array(
        [[(a + 0.5) / 4, (b + 0.5) / 3, (c + 0.5) / 2] for a in range(4) for b in range(3) for c in range(2)]
    )
    found = distinct_numbers(np.full(24, 4), grid).tolist()
    assert sorted(found) == sorted(map(list, itertools.permutations(range(4), 3)))


def dense_rows(seed: int) -> list[tuple[int, int]]:
    """Most texts under several labels: what small examples seldom have."""
    random = np.random.default_rng(seed)
    carried = random.random((6, 10)) < random.uniform(0.1, 0.9)
    carried[random.integers(6), random.integers(10)] = True
    return [(int(label), int(text)) for label, text in random.permutation(np.argwhere(carried))]


rows_of_labels = st.one_of(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=40),
    st.integers(0, 10**6).map(dense_rows),
)


@settings(deadline=None)
@given(rows_of_labels, st.integers(1, 3))
def test_uniform_negatives_are_the_texts_without_the_label_each_once(rows: list[tuple[int, int]], per_task: int):
    """A grid of uniforms walks through every number: each text of another label must come out exactly once."""
    label, text = (np.array(column) for column in zip(*rows, strict=True))
    task = np.arange(6) // per_task
    index = LabelIndex.of(label, text * 7, task)
    assert list(zip(index.label.tolist(), (index.text // 7).tolist(), strict=True)) == sorted(set(rows))
    for wanted in sorted(set(label.tolist())):
        carriers = {t for of, t in rows if of == wanted}
        others = {t for of, t in rows if task[of] == task[wanted]} - carriers
        grid = (np.arange(len(others)) + 0.5)[:, None] / max(len(others), 1)
        found = index.others(np.full(len(others), wanted), grid) if others else np.zeros((0, 1), int)
        assert sorted((found[:, 0] // 7).tolist()) == sorted(others)
        many = index.others(np.array([wanted]), np.full((1, 9), 0.999))[0]
        assert sorted((many[many != NONE] // 7).tolist()) == sorted(others)[:9] or len(others) > 9
        assert (many != NONE).sum() == min(len(others), 9)


@settings(deadline=None)
@given(rows_of_labels)
def test_uniform_negatives_of_a_whole_tile_are_those_of_each_query_alone(rows: list[tuple[int, int]]):
    label, text = (np.array(column) for column in zip(*rows, strict=True))
    index = LabelIndex.of(label, text, np.zeros(6, dtype=np.int64))
    uniform = np.random.default_rng(0).random((len(index.label), 2))
    together = index.others(index.label, uniform)
    alone = [index.others(index.label[[i]], uniform[[i]])[0].tolist() for i in range(len(index.label))]
    assert together.tolist() == alone


@pytest.mark.parametrize(("positive", "margin", "limit"), [(0.8, 0.05, 0.76), (-0.4, 0.05, -0.42), (0.5, -0.2, 0.6)])
def test_the_margin_lowers_the_limit_for_either_sign_of_the_similarity(positive: float, margin: float, limit: float):
    assert margin_limit(np.array([positive]), margin)[0] == pytest.approx(limit)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 5))
def test_chosen_takes_the_first_allowed_or_those_of_lowest_order(k: int, count: int, seed: int):
    random = np.random.default_rng(seed)
    allowed = random.random((4, k)) < 0.5
    order = random.integers(0, 2**63, (4, k)).astype(np.uint64)
    top, mixed_up = chosen(allowed, None, count), chosen(allowed, order, count)
    for row in range(4):
        left = np.flatnonzero(allowed[row])
        padding = [NONE] * max(0, count - len(left))
        assert top[row].tolist() == left[:count].tolist() + padding
        assert mixed_up[row].tolist() == left[np.argsort(order[row, left])][:count].tolist() + padding


def test_random_choice_is_uniform_without_replacement():
    allowed = np.array([[True, False, True, True, True]])
    order = mixed(np.arange(24_000, dtype=np.uint64)[:, None], np.arange(5, dtype=np.uint64))
    found = chosen(np.repeat(allowed, len(order), axis=0), order, 2)
    pairs, counts = np.unique(found, axis=0, return_counts=True)
    assert len(pairs) == 12 and (pairs[:, 0] != pairs[:, 1]).all() and 1 not in pairs
    assert tail_probability(*g_test(counts, np.full(12, 1 / 12))) > 1e-3


# Indexes -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(rows_of_labels, st.integers(1, 3))
def test_the_corpus_holds_each_text_of_a_task_once(rows: list[tuple[int, int]], per_task: int):
    label, text = (np.array(column) for column in zip(*rows, strict=True))
    task = np.arange(6) // per_task
    index = LabelIndex.of(label, text, task)
    for wanted in sorted(set(label.tolist())):
        start, stop = index.corpus_range(wanted)
        assert sorted(index.corpus[start:stop]) == sorted({t for of, t in rows if task[of] == task[wanted]})
    carried = {(int(of), int(t)) for of, t in zip(index.corpus_label, index.corpus, strict=True)}
    also = {(int(of), int(index.corpus[p])) for of, p in zip(index.also_label, index.also_place, strict=True)}
    assert carried | also == set(rows) and not carried & also


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(4, 9), st.integers(0, 2)), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=10),
)
def test_known_positives_and_the_query_itself_are_hidden(pairs: list, given_negatives: list):
    query, positive, task = (np.array(column) for column in zip(*pairs, strict=True))
    extra, extra_task = np.array(given_negatives, dtype=np.int64).reshape(-1, 2).T
    index = PairIndex.of(query, positive, task, extra, extra_task)
    assert list(zip(index.task, index.query, index.positive, strict=True)) == sorted({(t, q, p) for q, p, t in pairs})
    for wanted in sorted(set(task.tolist())):
        corpus = index.corpus[slice(*np.searchsorted(index.corpus_task, [wanted, wanted + 1]))]
        texts = {p for _, p, t in pairs if t == wanted} | {n for n, t in given_negatives if t == wanted}
        assert corpus.tolist() == sorted(texts)
        queries = np.array(sorted({q for q, _, t in pairs if t == wanted}))
        of, place = index.never(queries, wanted)
        assert place.tolist() == sorted(place.tolist())
        hidden = {(int(queries[i]), int(corpus[p])) for i, p in zip(of, place, strict=True)}
        known = {(q, p) for q, p, _ in pairs} | {(q, q) for q in queries.tolist()}
        assert hidden == {(q, p) for q, p in known if q in queries and p in texts}


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 7))
def test_tiles_cover_every_row_once_and_never_two_groups(groups: list[int], size: int):
    ascending = np.array(sorted(groups), dtype=np.int64)
    ranges = cut(ascending, size)
    assert [i for low, high in ranges for i in range(low, high)] == list(range(len(groups)))
    assert all(0 < high - low <= size and len(set(ascending[low:high])) == 1 for low, high in ranges)
    most = sum(-(-count // size) for count in np.bincount(ascending, minlength=1).tolist())
    assert len(ranges) == most
