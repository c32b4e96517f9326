"""Crowding: a text that stands in more rows of a task than the task has batches makes short batches, and many steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gist_ray.data.plan import EpochPlan
from gist_ray.data.shards import Shards
from gist_ray.html import clip

_STEPS_LEFT_UNSAID = 1.1  # times as many as the rows fill
_SHOWN_CHARS = 60


def crowded_tasks(shards: Shards, plan: EpochPlan, batch_size: int) -> Iterator[str]:
    """Say which tasks take many more batches than their rows fill, and the text to blame.

    A batch of a row or two has hardly any in-batch candidates, but is a step of the optimizer like any other.
    """
    task = shards.triplets.task
    rows = np.bincount(task[plan.rows], minlength=len(shards.tasks))
    batches = np.bincount(task[plan.rows[plan.starts[:-1]]], minlength=len(shards.tasks))
    full = -(-rows // batch_size)
    for number in np.flatnonzero(batches > np.maximum(_STEPS_LEFT_UNSAID * full, full + 1)):
        text, times = _most_repeated(shards, np.unique(plan.rows[task[plan.rows] == number]))
        yield (
            f"task {shards.tasks[number]} takes {batches[number]} batches, its {rows[number]} rows would fill "
            f"{full[number]}: {clip(text, _SHOWN_CHARS)!r} stands in {times} of them, and no text stands "
            "twice in a batch. Batches of a row or two teach little; keep fewer rows with such texts, or lower "
            "train.batch_size"
        )


def _most_repeated(shards: Shards, rows: np.ndarray) -> tuple[str, int]:
    """The text that stands in most of `rows`, and in how many."""
    some = shards.triplets.chosen(rows)
    every = np.arange(len(some))
    row = np.concatenate([every, every, np.repeat(every, np.diff(some.negative_starts))])
    texts = np.concatenate([some.query, some.positive, some.negatives])
    once = np.unique(texts * len(some) + row)  # a row may hold a text in several roles
    ids, times = np.unique(once // len(some), return_counts=True)
    return shards.texts.texts(ids[[times.argmax()]])[0], int(times.max())
