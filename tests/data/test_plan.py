import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.data.plan import plan_epoch, worker_rows
from gist_ray.data.shards import Triplets


def triplets_from(rows: list[tuple[int, int, list[int], int]]) -> Triplets:
    return Triplets(
        query=np.array([r[0] for r in rows], dtype=np.int64),
        positive=np.array([r[1] for r in rows], dtype=np.int64),
        negative_starts=np.cumsum([0, *(len(r[2]) for r in rows)]).astype(np.int64),
        negatives=np.array([n for r in rows for n in r[2]], dtype=np.int64),
        task=np.array([r[3] for r in rows], dtype=np.int64),
    )


# Few text ids, so that rows share texts often.
ROWS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.lists(st.integers(0, 30), max_size=3), st.integers(0, 2)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=150)
@given(ROWS, st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_a_plan_keeps_its_promises(rows, batch_size: int, seed: int, epoch: int):
    triplets = triplets_from(rows)
    plan = plan_epoch(triplets, batch_size, seed, epoch)
    assert sorted(np.concatenate(plan)) == list(range(len(rows)))  # each row once, tails kept
    for batch in plan:
        assert 1 <= len(batch) <= batch_size
        assert len({rows[i][3] for i in batch}) == 1
        texts = [text for i in batch for text in {rows[i][0], rows[i][1], *rows[i][2]}]
        assert len(texts) == len(set(texts))
    again = plan_epoch(triplets, batch_size, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))


def test_without_shared_texts_batches_are_full():
    triplets = triplets_from([(2 * i, 2 * i + 1, [], 0) for i in range(103)])
    sizes = sorted(len(batch) for batch in plan_epoch(triplets, 10, 0, 0))
    assert sizes == [3] + [10] * 10


def test_seed_and_epoch_change_the_order():
    triplets = triplets_from([(2 * i, 2 * i + 1, [], 0) for i in range(100)])
    orders = {tuple(np.concatenate(plan_epoch(triplets, 10, s, e))) for s, e in [(0, 0), (0, 1), (1, 0)]}
    assert len(orders) == 3


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 5))
def test_workers_share_a_batch_evenly(lengths: list[int], world_size: int):
    batch = np.arange(len(lengths)) * 7
    parts = [worker_rows(batch, np.array(lengths), rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts)) == batch.tolist()
    counts = [len(part) for part in parts]
    assert max(counts) - min(counts) <= 1
    if len(lengths) >= world_size:
        tokens = [sum(lengths[i // 7] for i in part) for part in parts]
        assert max(tokens) - min(tokens) <= 2 * max(lengths)


def test_negatives_of_rows():
    triplets = triplets_from([(0, 1, [5, 6], 0), (2, 3, [], 0), (4, 7, [8], 0)])
    assert triplets.negatives_of(np.array([2, 0])).tolist() == [8, 5, 6]
    assert triplets.negatives_of(np.array([1])).tolist() == []
    assert triplets.texts_of(np.array([0, 1])).tolist() == [0, 1, 2, 3, 5, 6]
