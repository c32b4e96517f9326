"""Reader: the one place where a model's texts are tokenized, beside its forwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE_CHARACTERS = 500
"""Up to so many are tokenized in the event loop: 0.1 ms of CPU for a query of MiniLM, 0.34 ms at most."""


class Reader:
    """Runs a tokenizer, never in two threads at once: it may not be used so."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._reading = threading.Lock()

    async def read(self, texts: Sequence[str], work: Callable[[], T]) -> T:
        """What `work` makes of `texts`: at once for a few words, since a thread and back take longer; else in a thread.

        Raises:
            Exception: whatever `work` raises.
        """
        if sum(map(len, texts)) <= INLINE_CHARACTERS and self._reading.acquire(blocking=False):
            try:
                return work()
            finally:
                self._reading.release()

        def alone() -> T:
            with self._reading:
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._thread, alone)

    def close(self) -> None:
        """End the thread; what has not begun is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)
