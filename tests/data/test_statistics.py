"""Statistics against a row-by-row count, and the laws of merging."""

import hashlib
import itertools
import json
import time
from collections import Counter
from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.data import sketch as sketch_module
from gist_ray.data import statistics
from gist_ray.data.sketch import Sketch
from gist_ray.data.statistics import MeasuredRows, Statistics, TaskStatistics, measure

MAX_TOKENS = 12
WORDS = ["a", "bb", "ccc", "dddd", "eeeee"]
REASONS = ["guide order", "minimum similarity"]
Row = dict[str, Any]


def key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def tokens(text: str) -> int:
    return 3 * len(text)


def piece(rows: list[Row]) -> MeasuredRows:
    """The arrays that `measure` takes, of rows spelled out."""
    negatives = [n for row in rows for n in row["negatives"]]
    tasks = sorted({row["task"] for row in rows}, reverse=True)
    return MeasuredRows(
        tasks=tasks,
        task=np.array([tasks.index(row["task"]) for row in rows], np.int64),
        row=np.array([row["row"] for row in rows], np.int64),
        reasons=REASONS,
        dropped=np.array([row["dropped"] for row in rows], np.int64),
        query_key=np.array([key(row["query"]) for row in rows], "S16"),
        positive_key=np.array([key(row["positive"]) for row in rows], "S16"),
        negative_starts=np.cumsum([0, *(len(row["negatives"]) for row in rows)]),
        negative_key=np.array([key(text) for text, _ in negatives], "S16"),
        query_tokens=np.array([tokens(row["query"]) for row in rows], np.int64),
        positive_tokens=np.array([tokens(row["positive"]) for row in rows], np.int64),
        negative_tokens=np.array([tokens(text) for text, _ in negatives], np.int64),
        max_tokens=MAX_TOKENS,
        guide_positive=np.array([row["guide"] for row in rows], np.float32),
        guide_negative=np.array([guide for _, guide in negatives], np.float32),
        text=lambda i: (rows[i]["query"], rows[i]["positive"], [text for text, _ in rows[i]["negatives"]]),
    )


def similarity(*texts: str) -> float:
    """Any fixed function of texts, with ties: a guide gives equal rows equal scores."""
    return float(np.float32(int.from_bytes(key("|".join(texts))[:1], "big") // 16 / 8 - 1))


def make_row(task: str, query: str, positive: str, negatives: list[str], dropped: int) -> Row:
    scored = [(text, similarity(query, text)) for text in negatives]
    guide = similarity(query, positive)
    return {"task": task, "query": query, "positive": positive, "negatives": scored, "guide": guide, "dropped": dropped}


def numbered(rows: list[Row]) -> list[Row]:
    kept = iter(range(len(rows)))
    return [row | {"row": -1 if row["dropped"] else next(kept)} for row in rows]


word = st.sampled_from(WORDS)
row_lists = st.lists(
    st.builds(
        make_row,
        st.sampled_from(["x", "y", "z"]),
        word,
        word,
        st.lists(word, max_size=3),
        st.sampled_from([0, 0, 0, 1, 2]),
    ),
    max_size=24,
).map(numbered)


def canonical(value: Statistics) -> str:
    return json.dumps(value.to_json(), sort_keys=True)


@given(row_lists)
def test_counts_are_those_of_a_row_by_row_count(rows: list[Row]):
    measured = measure(piece(rows)).tasks
    assert set(measured) == {row["task"] for row in rows}
    for name, task in measured.items():
        kept = [row for row in rows if row["task"] == name and not row["dropped"]]
        texts = [t for row in kept for t in (row["query"], row["positive"], *(n for n, _ in row["negatives"]))]
        lengths = Counter(tokens(text) for text in texts)
        assert task.dropped == Counter(
            REASONS[row["dropped"] - 1] for row in rows if row["task"] == name and row["dropped"]
        )
        assert (task.rows, task.texts, task.negatives) == (len(kept), len(texts), len(texts) - 2 * len(kept))
        assert task.lengths == lengths and task.max_length == max(lengths, default=0)
        assert task.truncated == sum(tokens(text) > MAX_TOKENS for text in texts)
        assert task.rows_with_negatives == sum(bool(row["negatives"]) for row in kept)
        assert task.misranked_rows == sum(any(g > row["guide"] for _, g in row["negatives"]) for row in kept)
        assert task.distinct_texts.distinct() == len(set(texts))
        assert task.distinct_rows.distinct() == len({content(row) for row in kept})
        assert task.guide_positive.sum() == len(kept) and task.guide_negative.sum() == task.negatives
        if kept:
            assert task.mean_guide_positive() == pytest.approx(np.mean([row["guide"] for row in kept]), abs=1e-9)
            for share in (0.05, 0.5, 0.95, 0.99):
                expected = np.quantile([tokens(t) for t in texts], share, method="inverted_cdf")
                assert task.length_quantile(share) == expected


def content(row: Row) -> tuple[Any, ...]:
    return row["query"], row["positive"], tuple(text for text, _ in row["negatives"])


@given(row_lists)
def test_examples_are_the_worst_distinct_rows_with_the_texts_they_are_about(rows: list[Row]):
    for name, task in measure(piece(rows)).tasks.items():
        kept = {content(row): row for row in reversed(rows) if row["task"] == name and not row["dropped"]}.values()
        badness = {
            "misranked": [max(g for _, g in r["negatives"]) - r["guide"] for r in kept if r["negatives"]],
            "dissimilar": [-row["guide"] for row in kept],
            "longest": [max(tokens(t) for t in (r["query"], r["positive"], *dict(r["negatives"]))) for r in kept],
        }
        badness["misranked"] = [excess for excess in badness["misranked"] if excess > 0]
        for kind, found in task.examples.items():
            expected = sorted(badness[kind], reverse=True)[: statistics.EXAMPLES_KEPT]
            assert [example.badness for example in found] == pytest.approx(expected)
            assert all(b.row_hash > a.row_hash for a, b in itertools.pairwise(found) if a.badness == b.badness)
            for example in found:
                row = next(row for row in kept if row["row"] == example.row)  # of repeated rows, the first
                assert (example.query, example.positive) == (row["query"], row["positive"])
                assert example.guide_positive == row["guide"]
                if row["negatives"]:
                    assert (example.negative, example.guide_negative) == shown_negative(kind, row)
                else:
                    assert example.negative is None and example.guide_negative is None
                shown = [example.query, example.positive, example.negative]
                assert example.tokens == [tokens(text) for text in shown if text is not None]


def shown_negative(kind: str, row: Row) -> tuple[str, float]:
    """The first negative with the most tokens, or with the highest guide score."""
    if kind == "longest":
        return max(row["negatives"], key=lambda scored: tokens(scored[0]))
    return max(row["negatives"], key=lambda scored: scored[1])


@given(row_lists, st.lists(st.integers(0, 24), max_size=4), st.randoms())
def test_merged_pieces_equal_the_whole_in_any_order(rows: list[Row], cuts: list[int], random):
    bounds = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    parts = [measure(piece(rows[a:b])) for a, b in itertools.pairwise(bounds)]
    whole = canonical(measure(piece(rows)).merge(Statistics()))
    assert canonical(reduce(Statistics.merge, parts, Statistics())) == whole
    random.shuffle(parts)
    while len(parts) > 1:  # any tree of merges
        parts.insert(random.randrange(len(parts) - 1), parts.pop().merge(parts.pop()))
    assert not parts or canonical(parts[0].merge(Statistics())) == whole


@given(row_lists)
def test_statistics_survive_json(rows: list[Row]):
    measured = measure(piece(rows))
    read = Statistics.from_json(json.loads(json.dumps(measured.to_json())))
    assert canonical(read) == canonical(measured)
    again = [read.merge(read), measured.merge(measured)]
    assert canonical(again[0]) == canonical(again[1])


hashes = st.lists(st.integers(0, 2**64 - 1), max_size=40).map(lambda values: Sketch.of(np.array(values, np.uint64)))


@given(hashes, hashes, hashes)
def test_merging_sketches_is_set_union(a: Sketch, b: Sketch, c: Sketch):
    def same(left: Sketch, right: Sketch) -> bool:
        return left.hashes.tolist() == right.hashes.tolist()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch_module, "SKETCH_HASHES", 16)
        a, b, c = (Sketch.of(sketch.hashes) for sketch in (a, b, c))
        assert same(a.merge(b), b.merge(a))
        assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
        assert same(a.merge(a), a)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60_000), st.integers(1, 4))
def test_distinct_counts_are_exact_while_few_and_within_five_sigma_beyond(seed: int, count: int, parts: int):
    values = np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)
    repeated = np.concatenate([values, values[: count // 3]])
    sketch = reduce(Sketch.merge, [Sketch.of(part) for part in np.array_split(repeated, parts)])
    if count <= sketch_module.SKETCH_HASHES:
        assert sketch.exact and sketch.distinct() == count
    else:
        assert not sketch.exact
        assert abs(sketch.distinct() - count) < 5 * count / sketch_module.SKETCH_HASHES**0.5


def test_a_sketch_is_exact_to_its_last_hash():
    values = np.random.default_rng(0).integers(0, 2**64, sketch_module.SKETCH_HASHES + 1, dtype=np.uint64)
    assert Sketch.of(values[1:]).exact and Sketch.of(values[1:]).distinct() == sketch_module.SKETCH_HASHES
    assert not Sketch.of(values).exact and len(Sketch.of(np.tile(values, 3)).hashes) == len(values)


def test_row_identity_is_the_exact_sequence_of_texts():
    rows = [
        make_row("t", "a", "bb", ["ccc", "dddd"], 0),
        make_row("t", "bb", "a", ["ccc", "dddd"], 0),
        make_row("t", "a", "bb", ["dddd", "ccc"], 0),
        make_row("t", "a", "bb", ["ccc"], 0),
        make_row("t", "a", "bb", ["ccc", "ccc"], 0),
        make_row("t", "a", "bb", [], 0),
        make_row("t", "a", "bb", ["ccc", "dddd"], 0),
    ]
    task = measure(piece(numbered(rows))).tasks["t"]
    assert task.distinct_rows.distinct() == 6
    assert task.sampled_rows().tolist() == [0, 1, 2, 3, 4, 5]
    parts = [measure(piece(part)).tasks["t"] for part in (numbered(rows)[:3], numbered(rows)[3:])]
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        assert merged.sampled_rows().tolist() == [0, 1, 2, 3, 4, 5]  # row 6 is row 0 again


def test_keys_that_end_in_zero_bytes_are_whole():
    rows = piece(numbered([make_row("t", "a", "bb", [], 0)] * 3))
    changed = np.array([b"\0" * 16, b"\0" * 7 + b"\1" + b"\0" * 8, b"\1" + b"\0" * 15], "S16")
    view = statistics._hashes(changed)
    assert view.tolist() == [0, 1, 1 << 56] and len(rows.query_key) == 3


def test_the_sample_is_uniform_over_distinct_rows():
    rows = numbered(
        [make_row("t", f"query {i}", "a", [], 0) for i in range(1000)] + [make_row("t", "a", "a", [], 0)] * 500
    )
    whole = measure(piece(rows)).tasks["t"].sampled_rows()
    assert len(whole) == statistics.SAMPLED_ROWS and whole.tolist() == sorted(set(whole.tolist()))
    quarters = np.bincount(whole // 250, minlength=5)
    assert quarters[4] <= 1  # of 500 equal rows at most one is drawn
    assert (np.abs(quarters[:4] - 32) < 5 * (128 * 0.25 * 0.75) ** 0.5).all()


@pytest.mark.parametrize("length", [1023, 1024, 1025, 5_000, 123_456, 2**31])
def test_long_lengths_lose_less_than_one_part_in_512(length: int):
    rounded = int(statistics._rounded_lengths(np.array([length]))[0])
    assert rounded <= length < rounded + max(1, length / 512)
    assert len(np.unique(statistics._rounded_lengths(np.arange(65_536)))) == 1024 + 6 * 512


def test_guide_scores_beyond_one_by_rounding_stay_in_the_outer_bins():
    scores = np.array([-1.000001, -1, -0.995, 0, 0.985, 1, 1.000001], np.float32)
    assert np.flatnonzero(statistics._guide_histogram(scores)).tolist() == [0, 100, 198, 199]
    assert statistics._guide_histogram(scores).sum() == len(scores)


def big_piece(rows: int, tasks: int) -> MeasuredRows:
    generator = np.random.default_rng(0)

    def keys(count: int) -> np.ndarray:
        return generator.integers(0, 256, (count, 16), dtype=np.uint8).view("S16")[:, 0]

    return MeasuredRows(
        tasks=[f"task-{i}" for i in range(tasks)],
        task=generator.integers(0, tasks, rows),
        row=np.arange(rows),
        reasons=[],
        dropped=np.zeros(rows, np.int64),
        query_key=keys(rows),
        positive_key=keys(rows),
        negative_starts=np.arange(rows + 1),
        negative_key=keys(rows),
        query_tokens=generator.integers(3, 600, rows),
        positive_tokens=generator.integers(3, 600, rows),
        negative_tokens=generator.integers(3, 600, rows),
        max_tokens=512,
        guide_positive=generator.uniform(-1, 1, rows).astype(np.float32),
        guide_negative=generator.uniform(-1, 1, rows).astype(np.float32),
        text=lambda i: ("q" * 4000, "p" * 4000, ["n" * 4000]),
    )


def test_a_piece_is_measured_in_a_moment_and_many_tasks_stay_small():
    rows = big_piece(65_536, 300)
    start = time.perf_counter()
    measured = measure(rows)
    assert time.perf_counter() - start < 5  # about 0.2 s; room for a busy machine
    assert sum(task.rows for task in measured.tasks.values()) == 65_536
    assert len(json.dumps(measured.to_json())) < 20e6
    assert all(len(example.query) == 300 for example in measured.tasks["task-0"].examples["longest"])


def test_size_does_not_grow_with_the_rows():
    few, many = (measure(big_piece(rows, 1)) for rows in (20_000, 65_536))
    assert len(canonical(many)) < 1.05 * len(canonical(few))


def test_no_rows_have_no_figures():
    assert measure(piece([])).tasks == {}
    nothing = TaskStatistics()
    assert nothing.length_quantile(0.5) == 0 and nothing.mean_guide_positive() is None
    assert Statistics().total().rows == 0
