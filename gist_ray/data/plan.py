"""Plan: which rows make which batch. Pure: no I/O, no state, no randomness beyond the seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gist_ray.data.shards import Triplets

Rows = npt.NDArray[np.int64]


def plan_epoch(triplets: Triplets, batch_size: int, seed: int, epoch: int) -> list[Rows]:
    """Batches of row numbers for one epoch.

    Every row stands in exactly one batch; a batch holds one task, at most `batch_size` rows, and no text twice; the
    last batch of a task may be short but is kept. The plan depends on the arguments alone, so a run can be resumed at
    any step and on any number of workers. Cost: one pass over the rows, O(texts of a row) each.

    A text that stands in more rows than a task has batches makes further, shorter batches: that is the price of
    "no text twice".
    """
    generator = np.random.default_rng([seed, epoch])
    batches: list[Rows] = []
    for task in np.unique(triplets.task):
        rows = generator.permutation(np.flatnonzero(triplets.task == task))
        batches += _pack(triplets, rows, batch_size)
    return [batches[i] for i in generator.permutation(len(batches))]


def worker_rows(batch: Rows, query_lengths: Rows, rank: int, world_size: int) -> Rows:
    """The rows of a global batch that one worker computes.

    Rows are dealt longest first, back and forth, so that workers get equal counts (to one) and nearly equal tokens.
    `query_lengths [batch]` weighs each row, for instance by its tokens.
    """
    order = np.argsort(-query_lengths, kind="stable")
    position = np.arange(len(batch))
    turn, place = position // world_size, position % world_size
    dealt_to = np.where(turn % 2 == 0, place, world_size - 1 - place)
    rows: Rows = batch[np.sort(order[dealt_to == rank])]
    return rows


def _pack(triplets: Triplets, rows: Rows, batch_size: int) -> list[Rows]:
    """First fit: each row goes to the first batch with room that comes after every batch holding one of its texts."""
    members: list[list[int]] = []
    next_with_room: list[int] = []  # union-find: first batch at or after i that has room
    after: dict[int, int] = {}

    def find(i: int) -> int:
        root = i
        while root < len(next_with_room) and next_with_room[root] != root:
            root = next_with_room[root]
        while i < len(next_with_room) and next_with_room[i] != root:
            next_with_room[i], i = root, next_with_room[i]
        return root

    starts = triplets.negative_starts
    for row in rows.tolist():
        texts = {int(triplets.query[row]), int(triplets.positive[row])}
        texts.update(triplets.negatives[starts[row] : starts[row + 1]].tolist())
        target = find(max(after.get(text, 0) for text in texts))
        while target >= len(members):
            next_with_room.append(len(members))
            members.append([])
        members[target].append(row)
        if len(members[target]) == batch_size:
            next_with_room[target] = target + 1
        after.update(dict.fromkeys(texts, target + 1))
    return [np.array(batch, dtype=np.int64) for batch in members]
