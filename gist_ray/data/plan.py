"""Plan: which rows make which batch. Pure: no I/O, no state, no randomness beyond the seed.

Everything is arrays, and repeated texts are found without sorting them: a tenth of a second for a million rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gist_ray.data.shards import Triplets

Rows = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]

# Slots of the packing table for each showing that shares a text, 4 bytes each. Fewer make more false alarms, each of
# which moves a row to another batch of its task.
_SLOTS = 4


@dataclass(frozen=True)
class EpochPlan:
    """The global batches of an epoch. Batch k is read without reading batches 0 to k - 1."""

    rows: Rows
    """Row numbers, batch after batch, `[showings]`; ascending inside a batch."""
    starts: Rows
    """Where each batch starts in `rows`, and the end of the last one, `[batches + 1]`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, step: int) -> Rows:
        """Row numbers of the global batch of a step, `[batch]`.

        Raises:
            IndexError: the epoch has no such step; steps are not counted from the end.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of an epoch of {len(self)} steps")
        return self.rows[self.starts[step] : self.starts[step + 1]]


class Planner:
    """Plans epochs over the same rows. What does not change from epoch to epoch is worked out once, here.

    `lengths [num_texts]` are student tokens. `weights [rows]` say how often an epoch shows each row; None: once.

    A plan keeps these rules. A batch holds rows of one task, at most `batch_size`, and no text id in two of its rows.
    Row i is shown floor(w (epoch + 1) + u) - floor(w epoch + u) times in an epoch, w its weight and u in [0, 1) a hash
    of (seed, i): exactly once with weight 1, and on average over epochs w times. Tails are kept as shorter batches. The
    plan depends on the arguments alone, so a run can be resumed at any step and on any number of workers.

    Rows of a task are dealt at random into windows of about `length_window` batches, sorted by their longest text
    inside a window and cut into batches, which are shuffled. The cost: a batch is a random draw from rows of similar
    length, not from all rows, and only batches of different windows are independent.

    The next batch is of task t with probability ~ left_t * batches_t^(1 / task_temperature - 1), where left_t of its
    batches_t batches are still to come: batches_t^(1 / task_temperature) when the epoch starts. Temperature 1 is a
    plain permutation of all batches, so every task is spread evenly; more brings small tasks forward.

    A text that stands in more rows than its task has batches makes further, much shorter batches: that is the price of
    "no text twice", and a reason to look at such texts.
    """

    def __init__(
        self,
        triplets: Triplets,
        lengths: Integers,
        *,
        batch_size: int,
        seed: int,
        weights: npt.NDArray[np.floating[Any]] | None = None,
        task_temperature: float = 1.0,
        length_window: int = 32,
    ) -> None:
        self._batch_size, self._seed, self._length_window = batch_size, seed, length_window
        self._task_temperature = task_temperature
        self._task = _narrow(triplets.task)
        self._tasks = int(triplets.task.max(initial=-1)) + 1
        self._weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        self._length_class = _length_classes(triplets, lengths) if length_window > 1 else None
        self._shared = _shared_texts(triplets, self._weights)

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of one epoch."""
        generator = np.random.default_rng([self._seed, epoch])
        shown, pairs = None, self._shared
        if self._weights is not None:
            counts = _times_shown(self._weights, self._seed, epoch)
            shown, pairs = np.repeat(np.arange(len(counts)), counts), pairs.repeated(counts)
        task = self._task if shown is None else self._task[shown]
        packing = _Packing(self._batch_size, task, self._tasks, self._cut(generator, task, shown), pairs)
        packing.pack(generator)
        # Sampling without replacement by exponential keys (Efraimidis and Spirakis, 2006).
        batches = np.bincount(packing.batch_task, minlength=self._tasks)[packing.batch_task]
        keys = generator.exponential(size=len(batches)) * batches ** (1 - 1 / self._task_temperature)
        turn = np.empty(len(batches), dtype=np.int64)
        turn[np.argsort(keys, kind="stable")] = np.arange(len(batches))
        step = _narrow(turn)[packing.batch_of]
        rows = _order(step)
        sizes = np.bincount(step, minlength=len(batches))
        return EpochPlan(rows if shown is None else shown[rows], np.concatenate([[0], np.cumsum(sizes)]))

    def _cut(self, generator: np.random.Generator, task: Integers, shown: Rows | None) -> Rows:
        """The showings in the order in which they are cut into batches: by task, window, length, and at random."""
        total = len(task)
        if self._length_class is None:
            return _order(task, generator.integers(1 << 16, size=total, dtype=np.uint16))
        windows = -(-np.bincount(task, minlength=self._tasks) // (self._batch_size * self._length_window))
        window = task
        if windows.max(initial=0) > 1:
            draws = generator.integers(1 << 32, size=total, dtype=np.uint32)
            window = (np.cumsum(windows) - windows)[task] + (draws * windows[task] >> 32)
        length = self._length_class if shown is None else self._length_class[shown]
        return _order(window, length | generator.integers(256, size=total, dtype=np.uint16))


@dataclass(frozen=True)
class _Pairs:
    """Which showings hold which text, for texts that more than one showing of a task holds.

    Ordered by text, then by showing. A text is known by its part of the packing table: it owns the slots `base` to
    `base + mask`, at least `_SLOTS` for each of its showings, a power of two.
    """

    showing: Integers
    base: Integers
    mask: Integers
    slots: int

    def where(self, chosen: Flags) -> _Pairs:
        """The chosen pairs."""
        return _Pairs(self.showing[chosen], self.base[chosen], self.mask[chosen], self.slots)

    def repeated(self, counts: Rows) -> _Pairs:
        """The pairs of showings, from those of rows, when row i is shown `counts[i]` times."""
        times = counts[self.showing]
        nth = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        showing = np.repeat((np.cumsum(counts) - counts)[self.showing], times) + nth
        return _Pairs(showing, np.repeat(self.base, times), np.repeat(self.mask, times), self.slots)


class _Packing:
    """Moves showings between the batches of their task until no text stands twice in a batch.

    A table says which showing holds (text, batch): each text has a few slots of its own, and a batch's number modulo
    their number picks one. All showings write themselves to their slots at once; a showing that then finds another in
    one of them has lost, and tries another batch. Different batches may fall on one slot; such a false alarm costs a
    try, never correctness. Of the showings that ask in a round, the last one wins all its slots: there is progress.
    """

    def __init__(self, batch_size: int, task: Integers, tasks: int, cut: Integers, pairs: _Pairs) -> None:
        self.batch_size, self.task, self.tasks, self.pairs = batch_size, task, tasks, pairs
        sizes = np.bincount(task, minlength=tasks)
        batches = -(-sizes // batch_size)
        self.batch_task, self.batches_cut = np.repeat(np.arange(tasks), batches), int(batches.sum())
        self.room = np.zeros(len(self.batch_task), dtype=np.int64)
        self.room[(np.cumsum(batches) - 1)[sizes > 0]] = (batches * batch_size - sizes)[sizes > 0]
        self.batch_of = np.empty(len(cut), dtype=np.int64)
        self.batch_of[cut] = np.repeat(np.arange(len(self.room)), batch_size - self.room)
        self.table: Integers = np.full(pairs.slots, -1, dtype=np.int32 if len(cut) < 1 << 31 else np.int64)

    def pack(self, generator: np.random.Generator) -> None:
        """Give every showing its final batch."""
        pairs = self.pairs
        needed = self._most_repeated() - np.bincount(self.batch_task, minlength=self.tasks)
        lost = self._enter(pairs)
        left = np.flatnonzero(lost)
        self.pairs = pairs.where(lost[pairs.showing])
        self.room += np.bincount(self.batch_of[left], minlength=len(self.room))
        self._add_batches(np.maximum(0, needed))
        left = self._fill(left, generator)
        if len(left):  # let them take the places of rows that share no text and can stand anywhere
            gives_way = np.flatnonzero(np.bincount(pairs.showing, minlength=len(self.batch_of)) == 0)
            self.room += np.bincount(self.batch_of[gives_way], minlength=len(self.room))
            left = self._fill(left, generator)
            while len(left):  # contrived data, or bad luck: batches for these alone, with a table that is empty
                self.room[:] = 0
                self.table.fill(-1)
                rows = np.bincount(self.task[left], minlength=self.tasks)
                self._add_batches(np.maximum(self._most_repeated(), -(-rows // self.batch_size)))
                left = self._fill(left, generator)
            self._move_out(gives_way)
        used = np.bincount(self.batch_of, minlength=len(self.batch_task)) > 0
        self.batch_task, self.batch_of = self.batch_task[used], (np.cumsum(used) - 1)[self.batch_of]

    def _most_repeated(self) -> Rows:
        """Showings of each task's most repeated text among `pairs`, `[tasks]`: it needs as many batches."""
        counts = _runs(self.pairs.base)
        most = np.zeros(self.tasks, dtype=np.int64)
        np.maximum.at(most, self.task[self.pairs.showing[np.cumsum(counts) - counts]], counts)
        return most

    def _move_out(self, gives_way: Rows) -> None:
        """Move showings of `gives_way` from batches that are too large to batches of their task with room."""
        excess = np.bincount(self.batch_of, minlength=len(self.room)) - self.batch_size
        gives_way = gives_way[excess[self.batch_of[gives_way]] > 0]
        gives_way = gives_way[_order(self.batch_of[gives_way])]
        batch = self.batch_of[gives_way]
        moved = gives_way[_places(batch) < excess[batch]]
        moved = moved[_order(self.task[moved])]
        by_task = _order(self.batch_task)
        ends = np.cumsum(np.maximum(0, -excess[by_task]))
        first = np.concatenate([[0], ends])[np.searchsorted(self.batch_task[by_task], self.task[moved])]
        self.batch_of[moved] = by_task[np.searchsorted(ends, first + _places(self.task[moved]), side="right")]

    def _enter(self, pairs: _Pairs) -> Flags:
        """Write the showings of `pairs` to the table under their batches; flags `[showings]` of those that lost."""
        table, showing = self.table, pairs.showing
        slot = pairs.base + (self.batch_of[showing] & pairs.mask)
        lost = np.zeros(len(self.batch_of), dtype=bool)
        taken = table[slot] >= 0
        if taken.any():
            lost[showing[taken]] = True
            asks = ~lost[showing]
            slot, showing = slot[asks], showing[asks]
        table[slot] = showing  # of several showings the last stays, which is the highest: pairs are ordered
        wins = table[slot] == showing
        lost[showing[~wins]] = True
        table[slot[wins & lost[showing]]] = -1
        return lost

    def _fill(self, left: Rows, generator: np.random.Generator) -> Rows:
        """Try to place the showings of `left` in the batches of their task that have room; returns those still left."""
        for _ in range(6):
            if len(left):
                left = self._attempt(left, self._choose(left, generator))
        return left

    def _choose(self, left: Rows, generator: np.random.Generator) -> Rows:
        """For each showing of `left` a batch of its task with room, without its texts if one is near.

        The showings of a text take turns: the first ones begin at a random batch among those that the rows were cut
        into, the others behind these, so that full batches stay full. The fewer showings are left the further they
        look for a batch without their texts, in the end at all batches.
        """
        pairs = self.pairs
        with_room = np.flatnonzero(self.room > 0)
        with_room = with_room[_order(self.batch_task[with_room])]
        choices = np.bincount(self.batch_task[with_room], minlength=self.tasks)
        cut = np.bincount(self.batch_task[with_room[with_room < self.batches_cut]], minlength=self.tasks)
        task = self.task[left]
        first, cut = (np.cumsum(choices) - choices)[task], np.maximum(1, cut)[task]
        choices = choices[task]  # never 0: a task's batches have a place for each of its rows

        runs = _runs(pairs.base)
        last_decides = _order(np.repeat(runs, runs))  # the most repeated text of a showing
        turn = np.empty(len(self.batch_of), dtype=np.int64)
        turn[pairs.showing[last_decides]] = _places(pairs.base)[last_decides]
        turn = turn[left]
        start = generator.integers(1 << 30, size=len(left)) % cut
        looks = min(max(1 << 16, len(self.batch_of) // 4) // len(pairs.showing), int(choices.max()))
        if looks <= 1:
            nth = np.where(turn < cut, start, turn) % choices
            return np.asarray(with_room[first + nth])
        begin = np.where(turn < cut, start, 0) + turn - turn % looks
        batches = with_room[first[:, None] + (begin[:, None] + np.arange(looks)) % choices[:, None]]
        row = np.searchsorted(left, pairs.showing)
        slots = pairs.base[:, None] + (batches[row] & pairs.mask[:, None])
        pair, look = np.nonzero(self.table[slots] >= 0)
        free = np.ones(batches.shape, dtype=bool)
        free[row[pair], look] = False
        nth = turn % np.maximum(1, free.sum(axis=1))
        chosen: Rows = batches[np.arange(len(left)), np.argmax(np.cumsum(free, axis=1) > nth[:, None], axis=1)]
        return chosen

    def _attempt(self, left: Rows, batch: Rows) -> Rows:
        """Move each showing of `left` to its `batch` if there is room and no text of it; returns those still left."""
        order = _order(batch)
        place = np.empty(len(left), dtype=np.int64)
        place[order] = _places(batch[order])
        fits = place < self.room[batch]
        self.batch_of[left[fits]] = batch[fits]
        flags = np.zeros(len(self.batch_of), dtype=bool)
        flags[left[fits]] = True
        lost = self._enter(self.pairs if fits.all() else self.pairs.where(flags[self.pairs.showing]))
        stays = ~fits | lost[left]
        self.room -= np.bincount(batch[~stays], minlength=len(self.room))
        flags[left] = stays
        self.pairs = self.pairs.where(flags[self.pairs.showing])
        return left[stays]

    def _add_batches(self, needed: Rows) -> None:
        self.batch_task = np.concatenate([self.batch_task, np.repeat(np.arange(self.tasks), needed)])
        self.room = np.concatenate([self.room, np.full(needed.sum(), self.batch_size)])


def _length_classes(triplets: Triplets, lengths: Integers) -> Integers:
    """Rank of each row by the tokens of its longest text, in 256 classes, in the high byte of 16 bits, `[rows]`."""
    tokens = np.maximum(lengths[triplets.query], lengths[triplets.positive]).astype(np.int64)
    some = np.diff(triplets.negative_starts) > 0
    if some.any():
        longest = np.maximum.reduceat(lengths[triplets.negatives], triplets.negative_starts[:-1][some])
        tokens[some] = np.maximum(tokens[some], longest)
    counts = np.bincount(tokens)
    classes = (np.cumsum(counts) - counts) * 256 // max(1, len(tokens))
    ranks: Integers = (classes << 8).astype(np.uint16)[tokens]
    return ranks


def _shared_texts(triplets: Triplets, weights: npt.NDArray[np.float64] | None) -> _Pairs:
    """The pairs of rows, not yet of showings, and texts that several showings of a task may hold."""
    total = len(triplets)
    every = np.arange(total)
    most = np.ones(total, dtype=np.int64) if weights is None else np.ceil(weights).astype(np.int64)
    texts = np.concatenate([triplets.query, triplets.positive, triplets.negatives])
    rows = np.concatenate([every, every, np.repeat(every, np.diff(triplets.negative_starts))])
    several = np.bincount(texts, weights=None if weights is None else most[rows]) > 1
    keep = several[texts]
    rows, texts = rows[keep], (np.cumsum(several) - 1)[texts[keep]]
    task = triplets.task[rows]
    order = _order(task, texts, rows)
    changes = np.diff(task[order], prepend=-1) | np.diff(texts[order], prepend=-1)
    rows, text = rows[order], np.cumsum(changes != 0) - 1
    distinct = (np.diff(rows, prepend=-1) | np.diff(text, prepend=-1)) != 0
    rows, text = rows[distinct], text[distinct]  # a row may hold a text in several roles
    showings = np.bincount(text, weights=most[rows])
    size = 1 << np.ceil(np.log2(np.maximum(1, _SLOTS * showings))).astype(np.int64)
    base, mask = (np.cumsum(size) - size)[text], (size - 1)[text]
    return _Pairs(rows, base, mask, int(size.sum())).where(showings[text] > 1)


def _times_shown(weights: npt.NDArray[np.float64], seed: int, epoch: int) -> Rows:
    """How often each row is shown in an epoch: its weight, rounded so that the sum over epochs stays within one."""
    # SplitMix64 of (seed, row). 32 bits: epoch + phase must be exact, or a weight of 1 might show a row twice.
    x = np.arange(len(weights), dtype=np.uint64) + np.random.SeedSequence(seed).generate_state(1, np.uint64)
    x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    phase = (x >> np.uint64(32)) / 2.0**32
    counts = np.floor(weights * (epoch + 1) + phase) - np.floor(weights * epoch + phase)
    shown: Rows = np.minimum(counts, np.ceil(weights)).astype(np.int64)
    return shown


def _order(*keys: Integers) -> Rows:
    """Stable order by the first key, then the second, and so on; keys are not negative."""
    digits: list[Integers] = []  # of 16 bits, for which numpy has a radix sort: five times as fast as 64-bit sorting
    for key in reversed(keys):
        bits = max(1, int(key.max(initial=0)).bit_length())
        digits += [(key >> shift).astype(np.uint16) for shift in range(0, bits, 16)]
    order: Rows = np.lexsort(digits)
    return order


def _runs(values: Integers) -> Rows:
    """Lengths of the runs of equal values."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
    return np.diff(np.append(starts, len(values)))


def _places(values: Integers) -> Rows:
    """Place of each value in its run of equal values."""
    runs = _runs(values)
    places: Rows = np.arange(len(values)) - np.repeat(np.cumsum(runs) - runs, runs)
    return places


def _narrow(values: Integers) -> Integers:
    """16-bit where they fit: random reads stay in cache, and sorting is quicker."""
    return values.astype(np.uint16) if values.max(initial=0) <= 0xFFFF else values
