"""Engine thread: where forwards run, batch after batch, with no pause for the event loop between two of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from gist_ray.encoder import TokenIds
from gist_ray.serving.engine import Engine, Vectors
from gist_ray.serving.lanes import Text

T = TypeVar("T")

Outcome = tuple[Vectors, float] | Exception
"""Vectors of a batch and the seconds that they took, or why there are none."""


class EngineThread:
    """One thread: one forward at a time is what makes the batches.

    It asks for the next batch itself when it has one: an event loop that is busy with requests would let the engine
    stand still for milliseconds after each forward.

    Args:
        engine: what computes.
        turn: held during each forward. Threads with the same one compute in turn: their CPUs are the same.
        take: the next batch, empty when nothing waits; called from this thread.
        ended: gets each batch, when its forward began (`time.perf_counter`) and its outcome; called from this thread.
        broken: gets what `take` or `ended` raised; nothing runs after it.
    """

    def __init__(
        self,
        engine: Engine,
        turn: threading.Lock,
        take: Callable[[], list[Text]],
        ended: Callable[[list[Text], float, Outcome], None],
        broken: Callable[[Exception], None],
    ) -> None:
        self._engine, self._turn = engine, turn
        self._take, self._ended, self._broken = take, ended, broken
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._state = threading.Lock()
        self._running, self._asked = False, False

    def wake(self) -> None:
        """Say that something waits; from any thread."""
        with self._state:
            self._asked = True
            if not self._running:
                self._running = True
                self._executor.submit(self._step)

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """What `work` returns in this thread, after the batch that runs."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *args)

    def forward(self, tokens: Sequence[TokenIds]) -> tuple[Vectors, float]:
        """Vectors `[n, dim]`, and the seconds that they took: not those of waiting for the turn.

        Raises:
            ValueError: the engine returned another shape, or numbers that are not finite.
            Exception: whatever the engine raises.
        """
        with self._turn:
            started = time.perf_counter()
            vectors = self._engine.finish(self._engine.forward(tokens))
            seconds = time.perf_counter() - started
        if vectors.shape != (len(tokens), self._engine.dim) or not np.isfinite(vectors).all():
            raise ValueError(f"engine returned shape {vectors.shape} or NaN/inf for {len(tokens)} texts")
        return vectors, seconds

    def close(self) -> None:
        """Stop. What runs is not waited for; what has not begun is dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _step(self) -> None:
        with self._state:
            self._asked = False
        try:
            batch = self._take()
            if batch:
                started = time.perf_counter()
                self._ended(batch, started, self._outcome([text.ids for text in batch]))
        except Exception as error:
            self._broken(error)
            return
        with self._state:
            self._running = bool(batch) or self._asked
            if self._running:
                self._executor.submit(self._step)  # behind who else waits for this thread: a probe, a warm-up

    def _outcome(self, tokens: list[TokenIds]) -> Outcome:
        try:
            return self.forward(tokens)
        except Exception as error:
            return error
