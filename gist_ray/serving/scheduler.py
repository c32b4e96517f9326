"""Scheduler: a queue of texts in front of one engine.

The unit is the text, not the request: a request of many texts fills several batches, and a batch serves many
requests. A batch is taken only when the engine is free: there is no timer, and a lone request starts at once.

When the engine has used up its window, the oldest queued texts, as many as fill `window_batches` batches,
become the next one. They are sorted by length and cut into batches of at most `batch_tokens` padded tokens,
which run shortest first. Only texts of one window can overtake each other, so whatever the load **no text is
overtaken by more than `window_batches - 1` batches**, and padding stays near that of a full sort.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from gist_ray.encoder import TokenIds, length_sorted_chunks
from gist_ray.serving.engine import Engine, Vectors

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER_LIMIT_S = 60
"""Longest wait that is asked of a client; the openai client obeys no longer one."""


class Overloaded(Exception):
    """The queue is full for now. Nothing of the request was queued."""

    def __init__(self, queued_tokens: int, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{queued_tokens} tokens wait, the limit is {limit}; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class RequestTooLarge(Exception):
    """More tokens in one request than the queue may ever hold."""


class TextTooLong(Exception):
    """A text is over `max_tokens` and may not be cut."""

    def __init__(self, index: int, tokens: int, limit: int) -> None:
        super().__init__(
            f"text {index} has {tokens} tokens and the model reads {limit}; "
            "shorten it, or set `truncate` to true to have it cut"
        )
        self.index = index


class ForwardFailed(Exception):
    """The engine failed on a batch that held a text of this request."""


class Closed(Exception):
    """The scheduler is not running."""


@dataclass(frozen=True)
class Embeddings:
    """The answer to one request.

    Attributes:
        vectors: float32 `[n, dim]`, unit norm, in the order of the texts.
        num_tokens: tokens the model read, special tokens included; equal texts count each time.
    """

    vectors: Vectors
    num_tokens: int


@dataclass
class Counters:
    """What happened since the start. Seconds are sums: of requests, of texts, of batches."""

    texts: int = 0
    tokens: int = 0
    texts_deduplicated: int = 0
    texts_dropped: int = 0
    requests_shed: int = 0
    batches: int = 0
    batches_failed: int = 0
    batch_texts: int = 0
    batch_tokens: int = 0
    padded_tokens: int = 0
    tokenize_seconds: float = 0.0
    queue_seconds: float = 0.0
    forward_seconds: float = 0.0


@dataclass(eq=False)
class _Request:
    vectors: Vectors
    missing: int
    done: asyncio.Future[None]
    texts: list[_Text] = field(default_factory=list)


@dataclass(eq=False)
class _Text:
    ids: TokenIds
    key: bytes
    queued_at: float
    rows: dict[_Request, list[int]] = field(default_factory=dict)
    """Who waits for this text, and in which rows of its answer. Empty: nobody any more."""
    running: bool = False


class Scheduler:
    """Batches the texts of concurrent requests for one engine: `async with Scheduler(engine) as scheduler`.

    Args:
        engine: what computes; its `forward` gets a thread of its own.
        batch_tokens: padded tokens per forward; a single longer text is a batch of its own.
        max_queue_tokens: tokens that may wait; above it `embed` raises Overloaded.
        window_batches: how many batches are sorted together; see the module text for what it bounds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_tokens: int = 2048,
        max_queue_tokens: int = 200_000,
        window_batches: int = 8,
    ) -> None:
        self.engine = engine
        self.batch_tokens = batch_tokens
        self.max_queue_tokens = max_queue_tokens
        self.window_batches = window_batches
        self.counters = Counters()
        self.queued_tokens = 0
        self._queue: deque[_Text] = deque()
        self._window: deque[list[_Text]] = deque()
        self._in_flight: dict[bytes, _Text] = {}
        self._work = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._warm = False
        # One thread each: a fast tokenizer may not be used by two threads at once, and one forward at a time
        # is what makes the batches. Tokenizing runs beside the forward.
        self._tokenizer = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="forward")
        # Until a batch has been measured: a slow guess, so that nobody is told to come back too early.
        self._rate_tokens, self._rate_seconds = 1000.0, 1.0

    async def start(self) -> None:
        """Take texts from now on, in the running event loop."""
        self._loop_task = asyncio.create_task(self._run(), name="scheduler")

    async def __aenter__(self) -> Scheduler:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop; whoever still waits gets Closed. The batch that runs is not waited for."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        self._tokenizer.shutdown(wait=False, cancel_futures=True)
        self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        """Warm and running."""
        return self._warm and self._running

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of forward, over the last batches."""
        return self._rate_tokens / self._rate_seconds

    async def warm_up(self) -> None:
        """Run the shortest and the largest batch once, so that no user pays for lazy initialisation.

        Raises:
            Exception: whatever the engine raises: a model that cannot run must not become ready.
        """
        texts = ["warm up", "warm up " * self.engine.max_tokens]
        short, longest = await self._in_thread(self._tokenizer, self.engine.tokenize, texts)
        rows = max(1, self.batch_tokens // len(longest))
        for batch in ([short], [longest] * rows):
            started = time.perf_counter()
            await self._in_thread(self._executor, self._forward, batch)
            self._measure(sum(len(row) for row in batch), time.perf_counter() - started)
        self._warm = True

    async def probe(self, deadline_s: float) -> None:
        """Run one tiny forward in the engine's own thread: proves that it is neither stuck nor broken.

        Raises:
            asyncio.TimeoutError: no answer within `deadline_s` seconds.
            Exception: whatever the engine raises.
        """
        if not self._running:
            raise Closed("the scheduler is not running")

        async def tiny_forward() -> None:
            tokens = await self._in_thread(self._tokenizer, self.engine.tokenize, ["a"])
            await self._in_thread(self._executor, self._forward, tokens)

        await asyncio.wait_for(tiny_forward(), deadline_s)

    async def embed(self, texts: Sequence[str], *, prompt: str = "", truncate: bool = True) -> Embeddings:
        """Vectors of the texts of one request. Cancelled, its texts leave the queue, unless others want them.

        Raises:
            Overloaded: the queue is full; come back after `retry_after_s`.
            RequestTooLarge: the request alone is over `max_queue_tokens`.
            TextTooLong: a text is over the model's limit and `truncate` is False.
            ForwardFailed: the engine failed on a batch with one of these texts.
            Closed: the scheduler is not running.
        """
        self._admit(1)  # a full queue is refused before tokenizing is paid for
        started = time.perf_counter()
        work = partial(self.engine.tokenize, texts, prompt=prompt, truncate=truncate)
        tokens = await self._in_thread(self._tokenizer, work)
        self.counters.tokenize_seconds += time.perf_counter() - started
        for index, row in enumerate(tokens):
            if len(row) > self.engine.max_tokens:  # only with truncate=False
                raise TextTooLong(index, len(row), self.engine.max_tokens)
        request = self._enqueue(tokens)
        try:
            if request.missing:
                await request.done
        finally:
            self._leave(request)
        return Embeddings(request.vectors, sum(len(row) for row in tokens))

    @property
    def _running(self) -> bool:
        return self._loop_task is not None and not self._loop_task.done()

    @staticmethod
    async def _in_thread(executor: ThreadPoolExecutor, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *args)

    def _enqueue(self, tokens: Sequence[TokenIds]) -> _Request:
        keys, known = [np.asarray(row, dtype=np.int32).tobytes() for row in tokens], self._in_flight
        fresh = {key: row for key, row in zip(keys, tokens, strict=True) if key not in known}
        self._admit(sum(len(row) for row in fresh.values()))
        vectors = np.empty((len(keys), self.engine.dim), dtype=np.float32)
        request = _Request(vectors, len(keys), done=asyncio.get_running_loop().create_future())
        now = time.perf_counter()
        for key, row in fresh.items():
            known[key] = _Text(row, key, queued_at=now)
            self._queue.append(known[key])
            self.queued_tokens += len(row)
        for index, key in enumerate(keys):
            text = known[key]
            text.rows.setdefault(request, []).append(index)
            request.texts.append(text)
        self.counters.texts += len(keys)
        self.counters.tokens += sum(len(row) for row in tokens)
        self.counters.texts_deduplicated += len(keys) - len(fresh)
        self._work.set()
        return request

    def _admit(self, num_tokens: int) -> None:
        if not self._running:
            raise Closed("the scheduler is not running")
        if num_tokens > self.max_queue_tokens:
            raise RequestTooLarge(
                f"the request has {num_tokens} tokens and the queue holds {self.max_queue_tokens}; split it"
            )
        excess = self.queued_tokens + num_tokens - self.max_queue_tokens
        if excess > 0:
            self.counters.requests_shed += 1
            wait_s = min(RETRY_AFTER_LIMIT_S, math.ceil(excess / self.tokens_per_second))
            raise Overloaded(self.queued_tokens, self.max_queue_tokens, wait_s)

    def _leave(self, request: _Request) -> None:
        """A request that is over, in whatever way, stops waiting; texts nobody waits for leave the queue."""
        if request.missing == 0:
            return
        for text in request.texts:
            if text.rows.pop(request, None) is not None and not text.rows and not text.running:
                self._in_flight.pop(text.key)  # its place in the queue stays, and is skipped
                self.queued_tokens -= len(text.ids)
                self.counters.texts_dropped += 1

    async def _run(self) -> None:
        try:
            while True:
                await self._work.wait()
                if batch := self._next_batch():
                    await self._run_batch(batch)
                else:
                    self._work.clear()
        finally:  # nobody may be left waiting, whatever ended the loop
            self._fail(list(self._in_flight.values()), Closed("the server is shutting down"))

    async def _run_batch(self, batch: list[_Text]) -> None:
        started = time.perf_counter()
        for text in batch:
            text.running = True
            self.queued_tokens -= len(text.ids)
            self.counters.queue_seconds += started - text.queued_at
        try:
            vectors = await self._in_thread(self._executor, self._forward, [text.ids for text in batch])
        except Exception as error:
            log.exception("forward failed on a batch of %d texts", len(batch))  # never the texts themselves
            self.counters.batches_failed += 1
            self._fail(batch, ForwardFailed(f"the model failed on this input ({type(error).__name__})"))
        else:
            self._count(batch, time.perf_counter() - started)
            self._deliver(batch, vectors)

    def _next_batch(self) -> list[_Text]:
        """Live texts to run next; empty when nothing waits."""
        while self._window or self._queue:
            if not self._window:
                self._window = self._next_window()
            batch = [text for text in self._window.popleft() if text.rows] if self._window else []
            if batch:
                return batch
        return []

    def _next_window(self) -> deque[list[_Text]]:
        """Take the oldest live texts off the queue and cut them into batches."""
        texts: list[_Text] = []
        room = self.window_batches * self.batch_tokens
        while self._queue and room > 0:
            text = self._queue.popleft()
            if text.rows:
                texts.append(text)
                room -= len(text.ids)
        batches = plan_window([len(text.ids) for text in texts], self.batch_tokens, self.window_batches)
        taken = sum(len(batch) for batch in batches)
        self._queue.extendleft(reversed(texts[taken:]))
        return deque([texts[i] for i in batch] for batch in batches)

    def _forward(self, tokens: list[TokenIds]) -> Vectors:
        vectors = self.engine.forward(tokens)
        if vectors.shape != (len(tokens), self.engine.dim) or not np.isfinite(vectors).all():
            raise ValueError(f"engine returned shape {vectors.shape} or NaN/inf for {len(tokens)} texts")
        return vectors

    def _deliver(self, batch: list[_Text], vectors: Vectors) -> None:
        for text, vector in zip(batch, vectors, strict=True):
            del self._in_flight[text.key]
            for request, rows in text.rows.items():
                request.vectors[rows] = vector
                request.missing -= len(rows)
                if request.missing == 0 and not request.done.done():
                    request.done.set_result(None)
            text.rows.clear()

    def _fail(self, batch: list[_Text], error: Exception) -> None:
        for text in batch:
            del self._in_flight[text.key]
            if not text.running:
                self.queued_tokens -= len(text.ids)
            for request in text.rows:
                if not request.done.done():
                    request.done.set_exception(type(error)(*error.args))  # each waiter its own traceback
            text.rows.clear()

    def _count(self, batch: list[_Text], seconds: float) -> None:
        lengths = [len(text.ids) for text in batch]
        self.counters.batches += 1
        self.counters.batch_texts += len(batch)
        self.counters.batch_tokens += sum(lengths)
        self.counters.padded_tokens += len(batch) * max(lengths)
        self.counters.forward_seconds += seconds
        self._measure(sum(lengths), seconds)

    def _measure(self, num_tokens: int, seconds: float) -> None:
        """Sums that forget: the rate follows the last ten batches or so."""
        self._rate_tokens = 0.9 * self._rate_tokens + num_tokens
        self._rate_seconds = 0.9 * self._rate_seconds + seconds


def plan_window(lengths: Sequence[int], batch_tokens: int, max_batches: int) -> list[list[int]]:
    """Cut the longest prefix found of `lengths` (tokens per text, oldest first) into length-sorted batches.

    Returns at most `max_batches` lists of indices, shortest texts first. Together they hold each index of a
    prefix once; a batch has at most `batch_tokens` padded tokens, unless it is a single text. Not empty if
    `lengths` is not.
    """
    size = len(lengths)
    while size:
        chunks = length_sorted_chunks(np.asarray(lengths[:size]), batch_tokens)
        if len(chunks) <= max_batches:
            return [chunk.tolist() for chunk in reversed(chunks)]
        size = size * max_batches // len(chunks)  # smaller, yet at least max_batches
    return []
