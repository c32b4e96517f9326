import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.data.plan import Planner
from gist_ray.data.shards import NO_LABEL, Triplets

TEXTS = 31  # few, so that rows share texts often


def triplets_from(rows: list[tuple[int, int, list[int], int]]) -> Triplets:
    return Triplets(
        query=np.array([r[0] for r in rows], dtype=np.int64),
        positive=np.array([r[1] for r in rows], dtype=np.int64),
        negative_starts=np.cumsum([0, *(len(r[2]) for r in rows)]).astype(np.int64),
        negatives=np.array([n for r in rows for n in r[2]], dtype=np.int64),
        task=np.array([r[3] for r in rows], dtype=np.int64),
        source=np.zeros(len(rows), dtype=np.int64),
        label=np.full(len(rows), NO_LABEL),
    )


def columns(query, positive, negative=None, task=None) -> Triplets:
    """Triplets of whole columns, one negative a row or none."""
    rows = len(query)
    return Triplets(
        query=np.asarray(query, dtype=np.int64),
        positive=np.asarray(positive, dtype=np.int64),
        negative_starts=np.arange(rows + 1) if negative is not None else np.zeros(rows + 1, dtype=np.int64),
        negatives=np.asarray([] if negative is None else negative, dtype=np.int64),
        task=np.zeros(rows, dtype=np.int64) if task is None else np.asarray(task, dtype=np.int64),
        source=np.zeros(rows, dtype=np.int64),
        label=np.full(rows, NO_LABEL),
    )


def lengths_for(triplets: Triplets) -> np.ndarray:
    top = max(int(ids.max(initial=0)) for ids in (triplets.query, triplets.positive, triplets.negatives))
    return np.random.default_rng(0).geometric(1 / 40, top + 1)


def plan_of(triplets: Triplets, batch_size: int, epoch: int = 0, seed: int = 0, **changes):
    return Planner(triplets, lengths_for(triplets), batch_size=batch_size, seed=seed, **changes).epoch(epoch)


def assert_rules(triplets: Triplets, plan, batch_size: int, shown=None) -> None:
    """The rules of a plan, checked on whole columns: `shown [rows]` is how often each row must stand in it."""
    sizes = np.diff(plan.starts)
    assert plan.starts[0] == 0 and plan.starts[-1] == len(plan.rows)
    assert (sizes >= 1).all() and (sizes <= batch_size).all()
    np.testing.assert_array_equal(np.bincount(plan.rows, minlength=len(triplets)), 1 if shown is None else shown)
    batch = np.repeat(np.arange(len(plan)), sizes)
    tasks = np.unique(np.stack([batch, triplets.task[plan.rows]]), axis=1)
    assert tasks.shape[1] == len(plan), "a batch holds two tasks"
    counts = np.diff(triplets.negative_starts)[plan.rows]
    place = np.concatenate([np.arange(len(batch))] * 2 + [np.repeat(np.arange(len(batch)), counts)])
    texts = [triplets.query[plan.rows], triplets.positive[plan.rows], triplets.negatives_of(plan.rows)]
    held = np.unique(np.stack([batch[place], np.concatenate(texts), place]), axis=1)  # of a row, each text once
    assert not (np.diff(held[:2], axis=1) == 0).all(axis=0).any(), "a batch holds a text twice"


def first_fit(triplets: Triplets, batch_size: int) -> int:
    """Batches of a packer that takes rows in random order, each to the first batch that will do (row by row)."""
    total = 0
    for task in np.unique(triplets.task):
        sizes: list[int] = []
        after: dict[int, int] = {}
        room = 0
        for row in np.random.default_rng(0).permutation(np.flatnonzero(triplets.task == task)).tolist():
            texts = triplets.texts_of(np.array([row])).tolist()
            target = max(room, *(after.get(text, 0) for text in texts))
            while target < len(sizes) and sizes[target] == batch_size:
                target += 1
            sizes += [0] * (target + 1 - len(sizes))
            sizes[target] += 1
            while room < len(sizes) and sizes[room] == batch_size:
                room += 1
            after.update(dict.fromkeys(texts, target + 1))
        total += len(sizes)
    return total


def fewest(triplets: Triplets, batch_size: int) -> int:
    """Batches that no packer can do without: of each task, for its rows and for its most repeated text."""
    total = 0
    for task in np.unique(triplets.task):
        rows = np.flatnonzero(triplets.task == task)
        held = Counter(text for row in rows for text in triplets.texts_of(np.array([row])).tolist())
        total += max(-(-len(rows) // batch_size), max(held.values()))
    return total


ROWS = st.lists(
    st.tuples(
        st.integers(0, TEXTS - 1),
        st.integers(0, TEXTS - 1),
        st.lists(st.integers(0, TEXTS - 1), max_size=3),
        st.integers(0, 2),
    ),
    max_size=60,
)
LENGTHS = st.lists(st.integers(1, 200), min_size=TEXTS, max_size=TEXTS).map(np.array)
SETTINGS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "seed": st.integers(0, 5),
        "task_temperature": st.sampled_from([1.0, 2.0, 10.0]),
        "length_window": st.integers(1, 4),
    }
)


@settings(max_examples=300, deadline=None)
@given(ROWS, LENGTHS, SETTINGS, st.integers(0, 5))
def test_a_plan_keeps_its_rules(rows, lengths, how, epoch: int):
    triplets = triplets_from(rows)
    plan = Planner(triplets, lengths, **how).epoch(epoch)
    assert_rules(triplets, plan, how["batch_size"])
    again = Planner(triplets, lengths, weights=np.ones(len(rows)), **how).epoch(epoch)
    np.testing.assert_array_equal(plan.rows, again.rows)
    np.testing.assert_array_equal(plan.starts, again.starts)


@settings(max_examples=200, deadline=None)
@given(ROWS, LENGTHS, SETTINGS, st.data())
def test_weights_say_how_often_rows_are_shown(rows, lengths, how, data):
    triplets = triplets_from(rows)
    weight = st.floats(0.05, 4.0) | st.sampled_from([0.5, 1.0, 2.0, 3.0])
    weights = np.array(data.draw(st.lists(weight, min_size=len(rows), max_size=len(rows))))
    planner = Planner(triplets, lengths, weights=weights, **how)
    shown = np.zeros(len(rows), dtype=np.int64)
    for epoch in range(4):
        plan = planner.epoch(epoch)
        now = np.bincount(plan.rows, minlength=len(rows))
        assert_rules(triplets, plan, how["batch_size"], now)
        assert ((now == np.floor(weights)) | (now == np.ceil(weights))).all()
        shown += now
        assert (np.abs(shown - weights * (epoch + 1)) < 1).all()


def test_weights_choose_rows_by_seed_and_evenly():
    triplets = columns(np.arange(20_000), np.arange(20_000, 40_000))
    half = np.full(20_000, 0.5)
    plans = [plan_of(triplets, 100, weights=half, seed=s, epoch=e) for s, e in [(0, 0), (0, 1), (1, 0)]]
    rows = [set(plan.rows.tolist()) for plan in plans]
    assert rows[0] | rows[1] == set(range(20_000)) and not rows[0] & rows[1]
    assert 0.45 < len(rows[0] & rows[2]) / 10_000 < 0.55
    assert 0.47 < sum(row < 10_000 for row in rows[0]) / len(rows[0]) < 0.53


def test_a_plan_is_read_by_step():
    plan = plan_of(columns(np.arange(25), np.arange(25, 50)), 10)
    assert len(plan) == 3
    assert [row for batch in plan for row in batch] == plan.rows.tolist()
    for step in (-1, 3):
        with pytest.raises(IndexError, match=f"step {step} of an epoch of 3 steps"):
            plan[step]


def test_no_rows_make_no_batches():
    assert len(plan_of(columns([], []), 8)) == 0
    assert len(plan_of(columns([0], [1]), 8, weights=np.array([0.001]), seed=1)) == 0


def test_without_shared_texts_batches_are_full():
    sizes = sorted(np.diff(plan_of(columns(np.arange(103), np.arange(103, 206)), 10).starts))
    assert sizes == [3] + [10] * 10


def test_seed_and_epoch_change_the_order():
    triplets = columns(np.arange(100), np.arange(100, 200))
    orders = {tuple(plan_of(triplets, 10, seed=s, epoch=e).rows) for s, e in [(0, 0), (0, 1), (1, 0)]}
    assert len(orders) == 3


def test_rows_meet_at_random():
    # Over many epochs any two rows stand together equally often, whatever their numbers.
    triplets = columns(np.arange(64), np.arange(64, 128))
    planner = Planner(triplets, np.full(128, 7), batch_size=8, seed=3)
    together = np.zeros((64, 64))
    for epoch in range(2000):
        for batch in planner.epoch(epoch):
            together[np.ix_(batch, batch)] += 1
    pairs = together[np.triu_indices(64, 1)]
    expected = 2000 * 7 / 63
    assert abs(pairs - expected).max() < 6 * np.sqrt(expected)
    neighbours = np.array([together[i, i + 1] for i in range(63)])
    assert abs(neighbours.mean() - expected) < 5 * np.sqrt(expected / 63)


def spread(plan, lengths: np.ndarray, triplets: Triplets) -> float:
    """Mean standard deviation inside a batch of the rows' longest texts."""
    rows = np.maximum(lengths[triplets.query], lengths[triplets.positive])
    return float(np.mean([rows[batch].std() for batch in plan]))


def test_rows_of_similar_length_stand_together():
    triplets = columns(np.arange(8000), np.arange(8000, 16000))
    lengths = lengths_for(triplets)
    by_window = {w: spread(plan_of(triplets, 50, length_window=w), lengths, triplets) for w in (1, 4, 32)}
    assert by_window[1] > 1.7 * by_window[4] > 1.7 * 3 * by_window[32]
    # Without sorting, a batch is a random draw: its mean length varies as that of independent draws.
    rows = np.maximum(lengths[triplets.query], lengths[triplets.positive])
    means = [rows[batch].mean() for batch in plan_of(triplets, 50, length_window=1)]
    assert 0.8 < np.std(means) / (rows.std() / np.sqrt(50)) < 1.2


def test_temperature_one_spreads_every_task_over_the_epoch():
    task = np.repeat([0, 1, 2], [20_000, 2_000, 200])
    triplets = columns(np.arange(len(task)), np.arange(len(task), 2 * len(task)), task=task)
    planner = Planner(triplets, lengths_for(triplets), batch_size=10, seed=0)
    places: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for epoch in range(20):
        plan = planner.epoch(epoch)
        for step, batch in enumerate(plan):
            places[int(task[batch[0]])].append((step + 0.5) / len(plan))
    for found in places.values():  # against the uniform distribution, Kolmogorov-Smirnov at about 1e-4
        gap = np.abs(np.sort(found) - np.linspace(0, 1, len(found))).max()
        assert gap < 2.2 / np.sqrt(len(found))


def test_temperature_brings_small_tasks_forward():
    task = np.repeat([0, 1], [20_000, 1_250])
    triplets = columns(np.arange(len(task)), np.arange(len(task), 2 * len(task)), task=task)

    def first_batches(temperature: float) -> float:
        planner = Planner(
            triplets, lengths_for(triplets), batch_size=10, seed=0, task_temperature=temperature, length_window=1
        )
        plans = [planner.epoch(epoch) for epoch in range(40)]
        return float(np.mean([task[plan[step][0]] for plan in plans for step in range(20)]))

    # Sixteen times as many batches: 1 of 17, and 1 of 5 at temperature 2 (sqrt 16 = 4), at the start of the epoch.
    assert first_batches(1.0) == pytest.approx(1 / 17, abs=0.03)
    assert first_batches(2.0) == pytest.approx(1 / 5, abs=0.05)
    assert first_batches(1e9) == pytest.approx(1 / 2, abs=0.06)


def realistic(rows: int, tasks: int, repeats: float, seed: int = 0) -> Triplets:
    """Questions mostly once; positives and negatives from one pool of answers, Zipf-distributed inside a task."""
    generator = np.random.default_rng(seed)
    task = np.sort(generator.integers(tasks, size=rows))
    pool = rows // 3
    answers = np.minimum(generator.zipf(repeats, (2, rows)), pool // tasks) * tasks + task
    return columns(np.arange(rows) + pool + tasks, answers[0], answers[1], task)


@pytest.mark.parametrize(
    ("tasks", "batch_size", "repeats"), [(1, 64, 1.05), (1, 64, 1.3), (8, 64, 1.2), (40, 128, 1.1), (1, 500, 1.1)]
)
def test_there_are_hardly_more_batches_than_first_fit_makes(tasks: int, batch_size: int, repeats: float):
    triplets = realistic(6_000, tasks, repeats)
    plan = plan_of(triplets, batch_size)
    assert_rules(triplets, plan, batch_size)
    assert len(plan) <= 1.03 * first_fit(triplets, batch_size) + 1
    assert len(plan) <= 1.1 * fewest(triplets, batch_size) + 1


def test_a_text_in_every_batch_fits_without_further_batches():
    # 50 batches of 20 and a text with exactly 50 rows: it must stand once in each.
    positive = np.arange(1000, 2000)
    positive[::20] = 2000
    plan = plan_of(columns(np.arange(1000), positive), 20)
    assert_rules(columns(np.arange(1000), positive), plan, 20)
    assert len(plan) == 50


WORST = {
    "one text in every row": lambda n: columns(np.arange(n), np.full(n, n)),
    "one negative in every row": lambda n: columns(np.arange(n), np.arange(n, 2 * n), np.full(n, 2 * n)),
    "every pair of few texts": lambda n: columns(*np.triu_indices(int((2 * n) ** 0.5), 1)),
    "few texts in all roles": lambda n: columns(*np.random.default_rng(0).integers(n // 20, size=(3, n))),
    "Zipf positives": lambda n: columns(np.arange(n), n + np.random.default_rng(0).zipf(1.5, n) % n),
    "many tasks of one row": lambda n: columns(np.arange(n), np.arange(n, 2 * n), task=np.arange(n)),
    "texts shared by tasks": lambda n: columns(np.arange(n) // 300, n + np.arange(n) // 300, task=np.arange(n) % 300),
}


@pytest.mark.parametrize("name", WORST)
def test_the_worst_data_stay_right_and_take_linear_time(name: str):
    seconds = []
    for rows in (5_000, 20_000):
        triplets = WORST[name](rows)
        planner = Planner(triplets, lengths_for(triplets), batch_size=1024, seed=0)
        started = time.process_time()
        plan = planner.epoch(0)
        seconds.append(time.process_time() - started)
        assert_rules(triplets, plan, 1024)
    assert seconds[1] < 10 * max(seconds[0], 0.02), seconds


def test_tasks_do_not_mix_up_their_texts():
    # The same texts in each of 300 tasks: no conflict inside a task, so nothing has to move.
    plan = plan_of(WORST["texts shared by tasks"](6_000), 20)
    assert len(plan) == 300


def test_memory_is_bounded_per_row():
    rows = 200_000
    triplets = realistic(rows, 50, 1.3)
    lengths = lengths_for(triplets)
    tracemalloc.start()
    try:
        Planner(triplets, lengths, batch_size=1024, seed=0).epoch(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / rows < 250


def test_negatives_of_rows():
    triplets = triplets_from([(0, 1, [5, 6], 0), (2, 3, [], 0), (4, 7, [8], 0)])
    assert triplets.negatives_of(np.array([2, 0])).tolist() == [8, 5, 6]
    assert triplets.negatives_of(np.array([1])).tolist() == []
    assert triplets.texts_of(np.array([0, 1])).tolist() == [0, 1, 2, 3, 5, 6]
