"""Scheduler: requests of texts in front of one engine.

The unit is the text, not the request: a request of many texts fills several batches, and a batch serves many
requests. A batch is taken only when the engine is free, by its own thread: there is no timer, and a lone request starts
at once.
Which texts make the next batch is told in `lanes.py`. A text that is known from before, or in flight, is not computed
again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from gist_ray.encoder import TokenIds
from gist_ray.serving.cache import VectorCache
from gist_ray.serving.engine import Engine, Vectors
from gist_ray.serving.engine_thread import EngineThread, Outcome
from gist_ray.serving.lanes import Lanes, Text
from gist_ray.serving.outcomes import Closed, Embeddings, ForwardFailed, Overloaded, RequestTooLarge, TextTooLong
from gist_ray.serving.pieces import Piece
from gist_ray.serving.reader import Reader
from gist_ray.serving.tuning import tuned_batch_tokens

log = logging.getLogger(__name__)

UNTUNED_BATCH_TOKENS = 1024
"""Until it is measured."""
TYPICAL_TOKENS = (16, 64)
"""Lengths of the texts that batches are tuned for: a query and a paragraph."""
FAST_LANE_TOKENS = 256
"""Requests up to this size go in the fast lane: a query or a few."""
RETRY_AFTER_LIMIT_S = 60
"""Longest wait that is asked of a client; the openai client obeys no longer one."""


@dataclass
class Counters:
    """What happened since the start."""

    texts: int = 0
    tokens: int = 0
    texts_deduplicated: int = 0
    texts_cached: int = 0
    texts_dropped: int = 0
    requests_shed: int = 0
    batches: int = 0
    batches_failed: int = 0
    batch_texts: int = 0
    batch_tokens: int = 0
    padded_tokens: int = 0
    forward_seconds: float = 0.0


@dataclass(eq=False)
class _Request:
    vectors: Vectors
    missing: int
    done: asyncio.Future[None]
    queued_at: float
    texts: list[Text] = field(default_factory=list)
    queue_s: float = 0.0


class Scheduler:
    """Batches the texts of concurrent requests for one engine: `async with Scheduler(engine) as scheduler`.

    Args:
        engine: what computes, in a thread of its own.
        batch_tokens: padded tokens per forward; a single longer text is a batch of its own. None: measured at warm-up.
        max_queue_tokens: tokens that may wait; above it `embed` raises Overloaded.
        window_batches: how many batches are sorted together; see `lanes.py` for what it bounds.
        cache_bytes: what the vectors of past texts may take; 0: they are not kept.
        turn: held during each forward. Schedulers with the same one compute in turn: their CPUs are the same.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_tokens: int | None = None,
        max_queue_tokens: int = 200_000,
        window_batches: int = 8,
        cache_bytes: int = 0,
        turn: threading.Lock | None = None,
    ) -> None:
        self.engine = engine
        self.max_queue_tokens = max_queue_tokens
        self.cache = VectorCache(cache_bytes)
        self.counters = Counters()
        self.queued_tokens = 0
        self._tuned = batch_tokens is None
        self._lanes = Lanes(batch_tokens or UNTUNED_BATCH_TOKENS, window_batches)
        self._in_flight: dict[bytes, Text] = {}
        self._queue = threading.Lock()  # held for what the engine's thread and the event loop both change
        self._asking, self._someone_left = 0, asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running, self._warm, self._waking = False, False, False
        self._reader = Reader()
        self._thread = EngineThread(engine, turn or threading.Lock(), self._take, self._ended, self._broken)
        # Until a batch has been measured: a slow guess, so that nobody is told to come back too early.
        self._rate_tokens, self._rate_seconds = 1000.0, 1.0

    async def start(self) -> None:
        """Take texts from now on, in the running event loop."""
        self._loop, self._running = asyncio.get_running_loop(), True

    async def __aenter__(self) -> Scheduler:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop; whoever still waits gets Closed. The batch that runs is not waited for."""
        self._stop()
        self._reader.close()
        self._thread.close()

    async def drain(self) -> None:
        """Stop when those who ask now have their answers. Who asks from now on may get Closed."""
        while self._asking:
            self._someone_left.clear()
            await self._someone_left.wait()
        await self.close()

    @property
    def batch_tokens(self) -> int:
        """Padded tokens per forward."""
        return self._lanes.batch_tokens

    @property
    def ready(self) -> bool:
        """Warm and running."""
        return self._warm and self._running

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of forward, over the last batches."""
        return self._rate_tokens / self._rate_seconds

    async def warm_up(self) -> None:
        """Run batches of the shortest to the longest texts, so that no user pays for lazy initialisation.

        Without a given `batch_tokens`, find the best one.

        Raises:
            Exception: whatever the engine raises: a model that cannot run must not become ready.
        """
        texts = ["warm up", "warm up " * self.engine.max_tokens]
        short, longest = await self._reader.read(texts, partial(self.engine.tokenize, texts))

        def seconds(rows: int, length: int) -> float:
            _, took = self._thread.forward([longest[:length]] * rows)
            self._measure(rows * length, took)
            return took

        if self._tuned:
            lengths = [min(length, len(longest)) for length in TYPICAL_TOKENS]
            self._lanes.batch_tokens = await self._thread.run(tuned_batch_tokens, seconds, lengths)
        for length in (len(short), len(longest)):
            await self._thread.run(seconds, max(1, self.batch_tokens // length), length)
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
            tokens = await self._reader.read(["a"], partial(self.engine.tokenize, ["a"]))
            await self._thread.run(self._thread.forward, tokens)

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
        with self._someone_asks():
            return await self._embed(texts, prompt, truncate)

    async def _embed(self, texts: Sequence[str], prompt: str, truncate: bool) -> Embeddings:
        self._admit(1)  # a full queue is refused before tokenizing is paid for
        started = time.perf_counter()
        tokens = await self._reader.read(texts, partial(self.engine.tokenize, texts, prompt=prompt, truncate=truncate))
        tokenized = time.perf_counter()
        for index, row in enumerate(tokens):
            if len(row) > self.engine.max_tokens:  # only with truncate=False
                raise TextTooLong(index, len(row), self.engine.max_tokens)
        request = self._enqueue(tokens)
        try:
            if request.missing:
                await request.done
        finally:
            self._leave(request)
        waited = time.perf_counter() - tokenized
        return Embeddings(
            request.vectors,
            sum(map(len, tokens)),
            tokenize_s=tokenized - started,
            queue_s=request.queue_s,
            forward_s=max(0.0, waited - request.queue_s),
        )

    async def pieces(self, texts: Sequence[str], *, prompt: str, special: bool) -> list[list[Piece]]:
        """As `Engine.pieces`."""
        work = partial(self.engine.pieces, texts, prompt=prompt, special=special)
        with self._someone_asks():
            return await self._reader.read(texts, work)

    @contextmanager
    def _someone_asks(self) -> Iterator[None]:
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
            self._someone_left.set()

    def _enqueue(self, tokens: Sequence[TokenIds]) -> _Request:
        keys, in_flight = [np.asarray(row, dtype=np.int32).tobytes() for row in tokens], self._in_flight
        vectors = np.empty((len(keys), self.engine.dim), dtype=np.float32)
        waiting, fresh = [], {}
        for index, key in enumerate(keys):
            if key in in_flight or key in fresh:
                waiting.append(index)
            elif (vector := self.cache.get(key)) is not None:
                vectors[index] = vector
            else:
                waiting.append(index)
                fresh[key] = tokens[index]
        num_tokens = sum(map(len, tokens))
        self._admit(sum(map(len, fresh.values())))
        now, fast = time.perf_counter(), num_tokens <= FAST_LANE_TOKENS
        request = _Request(vectors, len(waiting), asyncio.get_running_loop().create_future(), queued_at=now)
        with self._queue:  # a text is in the queue when somebody waits for it, not before
            for key, row in fresh.items():
                in_flight[key] = Text(row, key, queued_at=now)
                self._lanes.put(in_flight[key], fast=fast)
                self.queued_tokens += len(row)
            for index in waiting:
                text = in_flight[keys[index]]
                text.rows.setdefault(request, []).append(index)
                request.texts.append(text)
        self.counters.texts += len(keys)
        self.counters.tokens += num_tokens
        self.counters.texts_deduplicated += len(waiting) - len(fresh)
        self.counters.texts_cached += len(keys) - len(waiting)
        self._wake_soon()
        return request

    def _wake_soon(self) -> None:
        """Wake the engine's thread when the requests that are here already are in the queue too."""
        if not self._waking:
            self._waking = True
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._waking = False
        if self._running:
            self._thread.wake()

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
        with self._queue:
            for text in request.texts:
                if text.rows.pop(request, None) is not None and not text.rows and not text.running:
                    self._in_flight.pop(text.key)  # its place in the queue stays, and is skipped
                    self.queued_tokens -= len(text.ids)
                    self.counters.texts_dropped += 1

    def _take(self) -> list[Text]:
        """The next batch; from the engine's thread."""
        with self._queue:
            batch = self._lanes.next_batch()
            for text in batch:
                text.running = True
                self.queued_tokens -= len(text.ids)
        return batch

    def _ended(self, batch: list[Text], started: float, outcome: Outcome) -> None:
        """From the engine's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._answer, batch, started, outcome)

    def _broken(self, error: Exception) -> None:
        """From the engine's thread, which ends: nobody may be left waiting, and the health check must notice."""
        log.error("the scheduler ended", exc_info=error)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._running = False
        self._fail(list(self._in_flight.values()), Closed("the server is shutting down"))

    def _answer(self, batch: list[Text], started: float, outcome: Outcome) -> None:
        if not self._running:  # they were told so
            return
        for text in batch:
            for request in text.rows:
                request.queue_s = max(request.queue_s, started - max(text.queued_at, request.queued_at))
        if isinstance(outcome, Exception):
            log.error("forward failed on a batch of %d texts", len(batch), exc_info=outcome)  # never the texts
            self.counters.batches_failed += 1
            self._fail(batch, ForwardFailed(f"the model failed on this input ({type(outcome).__name__})"))
        else:
            vectors, seconds = outcome
            self._count(batch, seconds)
            self._deliver(batch, vectors)

    def _deliver(self, batch: list[Text], vectors: Vectors) -> None:
        for text, vector in zip(batch, vectors, strict=True):
            del self._in_flight[text.key]
            self.cache.put(text.key, vector)
            for request, rows in text.rows.items():
                request.vectors[rows] = vector
                request.missing -= len(rows)
                if request.missing == 0 and not request.done.done():
                    request.done.set_result(None)
            text.rows.clear()

    def _fail(self, batch: list[Text], error: Exception) -> None:
        with self._queue:
            for text in batch:
                del self._in_flight[text.key]
                if not text.running:
                    self.queued_tokens -= len(text.ids)
                for request in text.rows:
                    if not request.done.done():
                        request.done.set_exception(type(error)(*error.args))  # each waiter its own traceback
                text.rows.clear()

    def _count(self, batch: list[Text], seconds: float) -> None:
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
