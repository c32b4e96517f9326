"""Lanes: texts that wait for the engine, and the batches they leave in.

Small requests, mostly queries that a person waits for, have a lane of their own beside that of large ones.

Within a lane, when the window is used up, the oldest queued texts, as many as fill `window_batches` batches, become
the next one. They are sorted by length and cut into batches of at most `batch_tokens` padded tokens, which run
shortest first. Only texts of one window can overtake each other: **in its own lane no text is overtaken by more than
`window_batches - 1` batches**, and padding stays near that of a full sort.

While texts wait in both lanes, their batches take turns: **from the other lane a text is overtaken by at most one
batch before each batch of its own**, so the fast lane never more than doubles a wait, and no bulk request keeps a
query from every other batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gist_ray.chunks import length_sorted_chunks
from gist_ray.encoder import TokenIds


@dataclass(eq=False)
class Text:
    """A text that somebody waits for."""

    ids: TokenIds
    key: bytes
    """Equal for equal ids, and for no others."""
    queued_at: float
    """`time.perf_counter` seconds."""
    rows: dict[Any, list[int]] = field(default_factory=dict)
    """Who waits for this text, and in which rows of its answer. Empty: nobody any more; it is skipped."""
    running: bool = False


class Lanes:
    """Two queues of texts, `fast` and not.

    Args:
        batch_tokens: padded tokens of a batch; a single longer text is a batch of its own.
        window_batches: how many batches of a lane are sorted together.
    """

    def __init__(self, batch_tokens: int, window_batches: int) -> None:
        self.batch_tokens = batch_tokens
        self.window_batches = window_batches
        self._fast, self._slow = _Lane(), _Lane()
        self._slow_is_next = False

    def put(self, text: Text, *, fast: bool) -> None:
        """Add a text at the end of a lane."""
        (self._fast if fast else self._slow).queue.append(text)

    def next_batch(self) -> list[Text]:
        """Texts to run next, that somebody still waits for; empty when nothing waits."""
        turns = [self._slow, self._fast] if self._slow_is_next else [self._fast, self._slow]
        for lane in turns:
            if batch := self._batch_of(lane):
                self._slow_is_next = lane is self._fast
                return batch
        return []

    def __bool__(self) -> bool:
        return any(lane.queue or lane.window for lane in (self._fast, self._slow))

    def _batch_of(self, lane: _Lane) -> list[Text]:
        while lane.window or lane.queue:
            if not lane.window:
                self._cut(lane)
            batch = [text for text in lane.window.popleft() if text.rows] if lane.window else []
            if batch:
                return batch
        return []

    def _cut(self, lane: _Lane) -> None:
        """Take the oldest texts off the queue and make batches of them."""
        texts: list[Text] = []
        room = self.window_batches * self.batch_tokens
        while lane.queue and room > 0:
            text = lane.queue.popleft()
            if text.rows:
                texts.append(text)
                room -= len(text.ids)
        batches = plan_window([len(text.ids) for text in texts], self.batch_tokens, self.window_batches)
        taken = sum(len(batch) for batch in batches)
        lane.queue.extendleft(reversed(texts[taken:]))
        lane.window.extend([texts[i] for i in batch] for batch in batches)


class _Lane:
    def __init__(self) -> None:
        self.queue: deque[Text] = deque()
        self.window: deque[list[Text]] = deque()


def plan_window(lengths: Sequence[int], batch_tokens: int, max_batches: int) -> list[list[int]]:
    """Cut the longest prefix found of `lengths` (tokens per text, oldest first) into length-sorted batches.

    Returns at most `max_batches` lists of indices, shortest texts first. Together they hold each index of a
    prefix once; a batch has at most `batch_tokens` padded tokens, unless it is a single text. Not empty if
    `lengths` is not.
    """
    size = len(lengths)
    while size:
        # Backwards twice: shortest first, and the oldest first of equal lengths.
        chunks = length_sorted_chunks(np.asarray(lengths[:size])[::-1], batch_tokens)
        if len(chunks) <= max_batches:
            return [(size - 1 - chunk[::-1]).tolist() for chunk in reversed(chunks)]
        size = size * max_batches // len(chunks)  # smaller, yet at least max_batches
    return []
