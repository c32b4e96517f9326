"""Miners against plain loops in float64, on a real text table."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gist_ray.data import miners
from gist_ray.data.miners import LabelMiner, Mined, PairMiner
from gist_ray.data.mining import NONE, LabelIndex, PairIndex, mixed, uniforms
from gist_ray.data.texts import TextBlock, TextTable, text_key
from gist_ray.mine_config import MineConfig
from gist_ray.recipe_file import parsed_settings

TEXTS, LABELS = 40, 6


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TextTable:
    """Texts in two blocks, with vectors in eight dimensions; the last two texts have the same vector."""
    folder = tmp_path_factory.mktemp("texts")
    texts = sorted((f"text {i}" for i in range(TEXTS)), key=text_key)
    keys = np.array([text_key(text) for text in texts], dtype="S16")
    vectors = np.random.default_rng(0).normal(size=(TEXTS, 8)) + 1
    vectors[-1] = vectors[-2]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for number, part in enumerate((slice(0, 15), slice(15, TEXTS))):
        TextBlock(keys[part], texts[part], vectors[part].astype(np.float16)).write(folder / f"block-{number}.arrow")
    return TextTable(folder)


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miners, "_CANDIDATES_PER_TILE", 7)
        patch.setattr(miners, "_QUERIES_PER_RESCORING", 3)
        yield


def config(**settings: Any) -> MineConfig:
    return parsed_settings(MineConfig, {"source": {"path": "x"}, "guide": {"path": "x"}, **settings}, "mine")


HASH = np.array([int.from_bytes(text_key(str(i))[:8], "big") for i in range(TEXTS)], dtype=np.uint64)
LABEL_HASH = mixed(np.arange(LABELS, dtype=np.uint64), 99)
LABEL_TASK = np.arange(LABELS) // 4


def dense_rows(seed: int) -> list[tuple[int, int]]:
    """Many texts under several labels: what small examples seldom have."""
    random = np.random.default_rng(seed)
    carried = random.random((LABELS, TEXTS)) < random.uniform(0.05, 0.6)
    carried[random.integers(LABELS), random.integers(TEXTS)] = True
    return [(int(label), int(text)) for label, text in np.argwhere(carried)]


rows_of_labels = st.one_of(
    st.lists(st.tuples(st.integers(0, LABELS - 1), st.integers(0, TEXTS - 1)), min_size=1, max_size=80),
    st.integers(0, 10**6).map(dense_rows),
).map(lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True)))


def mine_labels(
    table: TextTable, label: np.ndarray, text: np.ndarray, **options: Any
) -> tuple[LabelIndex, list[Mined]]:
    index = LabelIndex.of(label, text, LABEL_TASK)
    miner = LabelMiner(config(**options), table, HASH, index, LABEL_HASH)
    middle, end = int(np.searchsorted(index.label, 4)), len(index.label)  # labels from 4 on are of the second task
    return index, [miner.mine(a, b) for a, b in ((0, middle), (middle, end)) if a < b]


def cosines(table: TextTable) -> np.ndarray:
    vectors = table.guide(np.arange(TEXTS)).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.einsum("id,jd->ij", vectors, vectors)


def stream(seed: int, first: int, second: int) -> np.ndarray:
    return mixed(mixed(mixed(np.array([seed], np.uint64), np.uint64(first)), np.uint64(second)), 0)


def best(cosine: np.ndarray, candidates: set[int], k: int) -> list[int]:
    return sorted(candidates, key=lambda i: (-cosine[i], i))[:k]


def expected_positive(cosine: np.ndarray, others: set[int], k: int, temperature: float, uniform: float) -> int:
    top = best(cosine, others, k)
    weights = np.exp((cosine[top] - cosine[top].max()) / temperature)
    return top[min(int(np.searchsorted(np.cumsum(weights) / weights.sum(), uniform, side="right")), len(top) - 1)]


def expected_hard(
    cosine: np.ndarray, positive: int, candidates: set[int], options: dict[str, Any], draws: np.ndarray
) -> tuple[list[int], int]:
    found = best(cosine, candidates, options["top_k"])
    limit = cosine[positive] - options["margin"] * abs(cosine[positive])
    left = [i for i in found if cosine[i] < limit]
    if options["sampling"] == "random":
        order = mixed(mixed(draws, 2), HASH)
        chosen = sorted(left, key=lambda i: order[i])
    else:
        chosen = left
    wanted = chosen[: options["num_negatives"]]
    return wanted + [NONE] * (options["num_negatives"] - len(wanted)), len(found) - len(left)


@settings(max_examples=60, deadline=None)
@given(rows_of_labels, st.integers(1, 6), st.sampled_from(["random", "top"]), st.integers(0, 5))
@example((np.zeros(12, int), np.array([*range(10), TEXTS - 2, TEXTS - 1])), 1, "random", 0)  # a tie for the last place
def test_labelled_triplets_are_those_of_a_plain_loop(table: TextTable, rows: Any, k: int, sampling: str, seed: int):
    options = {"top_k": k, "sampling": sampling, "seed": seed, "num_negatives": 2, "margin": 0.1, "temperature": 0.2}
    index, tiles = mine_labels(table, *rows, negatives="hard", **options)
    cosine = cosines(table)
    carried = {label: set(rows[1][rows[0] == label].tolist()) for label in range(LABELS)}
    found, removed = [], 0
    for label, query in zip(index.label.tolist(), index.text.tolist(), strict=True):
        same = carried[label] - {query}
        if not same:
            continue
        draws = stream(seed, HASH[query], LABEL_HASH[label])
        positive = expected_positive(cosine[query], same, k, 0.2, uniforms(mixed(draws, 1))[0])
        task = LABEL_TASK[label]
        others = set().union(*(carried[other] for other in range(LABELS) if LABEL_TASK[other] == task)) - carried[label]
        negatives, gone = expected_hard(cosine[query], positive, others, options, draws)
        removed += gone
        found.append((query, positive, negatives, task))
    mined = [row for m in tiles for row in zip(m.query, m.positive, m.negatives.tolist(), m.task, strict=True)]
    assert mined == found
    assert sum(m.removed for m in tiles) == removed


@settings(max_examples=60, deadline=None)
@given(rows_of_labels, st.sampled_from(["uniform", "hard"]), st.integers(0, 4))
def test_a_text_is_never_its_own_positive_or_negative_nor_a_negative_of_its_label(
    table: TextTable, rows: Any, negatives: str, count: int
):
    index, tiles = mine_labels(table, *rows, negatives=negatives, num_negatives=count, top_k=8, margin=-0.5)
    labels_of = {text: set(rows[0][rows[1] == text].tolist()) for text in range(TEXTS)}
    queries = 0
    for mined in tiles:
        assert mined.negatives.shape == (len(mined.query), count)
        queries += len(mined.query)
        for query, positive, row in zip(mined.query, mined.positive, mined.negatives.tolist(), strict=True):
            given_negatives = [text for text in row if text != NONE]
            shared = labels_of[query] & labels_of[positive]
            assert query != positive and shared
            assert len(set(given_negatives)) == len(given_negatives)
            assert not {query, positive} & set(given_negatives)
            assert all(shared - labels_of[text] for text in given_negatives)
    sizes = np.diff(index.label_starts)
    assert queries == sizes[sizes > 1].sum()


@settings(max_examples=60, deadline=None)
@given(rows_of_labels, st.sampled_from(["uniform", "hard"]), st.integers(1, 9))
def test_tiles_do_not_change_the_triplets(table: TextTable, rows: Any, negatives: str, size: int):
    index, whole = mine_labels(table, rows[0] % 4, rows[1], negatives=negatives, top_k=5)
    miner = LabelMiner(config(negatives=negatives, top_k=5), table, HASH, index, LABEL_HASH)
    parts = [miner.mine(a, min(a + size, len(index.label))) for a in range(0, len(index.label), size)]
    for name in ("query", "positive", "negatives"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole[0], name).tolist()


pairs = st.lists(
    st.tuples(st.integers(0, TEXTS - 1), st.integers(0, TEXTS - 1), st.integers(0, 1)).filter(lambda p: p[0] != p[1]),
    min_size=1,
    max_size=50,
)
given_negatives = st.lists(st.tuples(st.integers(0, TEXTS - 1), st.integers(0, 1)), max_size=10)


@settings(max_examples=60, deadline=None)
@given(pairs, given_negatives, st.integers(2, 6), st.sampled_from(["random", "top"]), st.sampled_from([0.0, 0.1, -0.2]))
def test_pairs_get_the_hard_negatives_of_a_plain_loop(
    table: TextTable, pairs: Any, extra: Any, k: int, sampling: str, margin: float
):
    options = {"top_k": k, "sampling": sampling, "num_negatives": 2, "margin": margin}
    index = PairIndex.of(*np.array(pairs).T, *np.array(extra, dtype=np.int64).reshape(-1, 2).T)
    miner = PairMiner(config(**options), table, HASH, index)
    cosine = cosines(table)
    for task in (0, 1):
        first, stop = np.searchsorted(index.task, [task, task + 1]).tolist()
        if first == stop:
            continue
        corpus = {p for _, p, t in pairs if t == task} | {n for n, t in extra if t == task}
        expected, removed = [], 0
        for query, positive in sorted({(q, p) for q, p, t in pairs if t == task}):
            candidates = corpus - {query} - {p for q, p, _ in pairs if q == query}
            draws = stream(1029, HASH[query], HASH[positive])
            negatives, gone = expected_hard(cosine[query], positive, candidates, options, draws)
            expected.append((query, positive, negatives))
            removed += gone
        mined = miner.mine(first, stop)
        assert list(zip(mined.query, mined.positive, mined.negatives.tolist(), strict=True)) == expected
        assert mined.removed == removed and set(mined.task.tolist()) == {task}


def test_a_candidate_with_the_positives_very_vector_is_no_negative_even_without_a_margin(table: TextTable):
    query, positive, twin, far = 0, TEXTS - 1, TEXTS - 2, int(np.argmin(cosines(table)[0]))
    index = PairIndex.of(
        *(np.array([value]) for value in (query, positive, 0)), np.array([twin, far]), np.zeros(2, int)
    )
    mined = PairMiner(config(margin=0.0, num_negatives=2), table, HASH, index).mine(0, 1)
    assert mined.negatives.tolist() == [[far, NONE]] and mined.removed == 1
