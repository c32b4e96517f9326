"""The laws of the scheduler, on an engine without a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.encoder import TokenIds
from gist_ray.serving.engine import Vectors
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.outcomes import Closed, ForwardFailed, Overloaded, RequestTooLarge, TextTooLong
from gist_ray.serving.scheduler import Scheduler

LAW = settings(max_examples=40, deadline=None)


class Recorder(FakeEngine):
    """Notes every batch; waits at a gate, so that a test decides when the engine is busy; fails if told."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.batches: list[list[tuple[int, ...]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.poison: tuple[int, ...] | None = None

    def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
        self.batches.append([tuple(row.tolist()) for row in tokens])
        self.entered.set()
        assert self.gate.wait(10)
        if self.poison in self.batches[-1]:
            raise RuntimeError("poisoned")
        return super().forward(tokens)

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenize([text])[0].tolist())


def words(count: int, tag: int = 0) -> str:
    """A text of `count` + 2 tokens; texts of different tags differ."""
    return " ".join([f"t{tag}", *(f"w{i}" for i in range(count - 1))])


def alone(engine: FakeEngine, texts: Sequence[str]) -> Vectors:
    """What each text gives by itself."""
    return np.concatenate([engine.forward([row]) for row in FakeEngine.tokenize(engine, texts)])


async def busy(scheduler: Scheduler, engine: Recorder) -> asyncio.Task:
    """Occupy the engine until its gate opens."""
    engine.entered.clear()
    engine.gate.clear()
    task = asyncio.create_task(scheduler.embed(["occupied"]))
    while not engine.entered.is_set():
        await asyncio.sleep(0.001)
    return task


async def queued(scheduler: Scheduler, *requests: Sequence[str]) -> list[asyncio.Task]:
    """Start requests one after the other, each in the queue before the next."""
    tasks = []
    for texts in requests:
        before = scheduler.counters.texts
        tasks.append(asyncio.create_task(scheduler.embed(texts)))
        while scheduler.counters.texts == before:
            await asyncio.sleep(0.001)
    return tasks


@LAW
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), max_size=12), max_size=8),
    st.integers(4, 64),
    st.integers(1, 4),
)
def test_every_text_is_answered_in_order_within_the_budget(requests, batch_tokens, window_batches):
    async def run() -> None:
        engine = Recorder()
        asked = [[words(count, tag) for count, tag in request] for request in requests]
        async with Scheduler(engine, batch_tokens=batch_tokens, window_batches=window_batches) as scheduler:
            answers = await asyncio.gather(*(scheduler.embed(texts) for texts in asked))
            batches = list(engine.batches)
            assert scheduler.queued_tokens == 0 and not scheduler._in_flight and not scheduler._lanes
        for texts, answer in zip(asked, answers, strict=True):
            assert answer.vectors.shape == (len(texts), engine.dim)
            assert answer.num_tokens == sum(len(text.split()) + 2 for text in texts)
            if texts:
                np.testing.assert_array_equal(answer.vectors, alone(engine, texts))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= batch_tokens
            assert len(set(batch)) == len(batch)

    asyncio.run(run())


def test_sorting_saves_padding():
    async def run() -> None:
        engine = Recorder()
        lengths = np.random.default_rng(0).integers(1, 60, 400)
        async with Scheduler(engine, batch_tokens=512) as scheduler:
            await scheduler.embed([words(int(count), tag) for tag, count in enumerate(lengths)])
            counters = scheduler.counters
        sorted_share = 1 - counters.batch_tokens / counters.padded_tokens
        sizes = (lengths + 2).tolist()
        arrival = [sizes[i : i + 8] for i in range(0, 400, 8)]  # 8 of the longest fill 512
        arrival_share = 1 - sum(sizes) / sum(len(batch) * max(batch) for batch in arrival)
        assert sorted_share < 0.12 and sorted_share < arrival_share / 3

    asyncio.run(run())


def test_equal_texts_in_flight_are_computed_once():
    async def run() -> None:
        engine = Recorder()
        async with Scheduler(engine) as scheduler:
            occupied = await busy(scheduler, engine)
            # "occupied" runs already, "a" is queued, and both come again, in the same request and in others.
            tasks = await queued(scheduler, ["a", "a"], ["a", "occupied"], ["b"])
            engine.gate.set()
            answers = await asyncio.gather(occupied, *tasks)
            assert scheduler.counters.texts_deduplicated == 3
            assert answers[1].num_tokens == 6  # both count
        assert sorted(row for batch in engine.batches for row in batch) == sorted(
            engine.ids(text) for text in ("occupied", "a", "b")
        )
        np.testing.assert_array_equal(answers[2].vectors, alone(engine, ["a", "occupied"]))

    asyncio.run(run())


def test_a_text_asked_for_again_is_answered_from_the_cache_bit_for_bit():
    async def run() -> None:
        engine = Recorder()
        async with Scheduler(engine, cache_bytes=10_000) as scheduler:
            first = await scheduler.embed(["a", "b"])
            again = await scheduler.embed(["b", "c", "a"])
            assert scheduler.counters.texts_cached == 2 and scheduler.counters.texts_deduplicated == 0
            assert engine.batches[1:] == [[engine.ids("c")]]
            np.testing.assert_array_equal(again.vectors[[2, 0]], first.vectors)
            assert again.num_tokens == 9  # what was known counts as well
            again.vectors[:] = 0  # the caller's own
            known = await scheduler.embed(["a", "b"])
            np.testing.assert_array_equal(known.vectors, first.vectors)
            assert len(engine.batches) == 2
            # A full queue takes what needs no place in it.
            occupied = await busy(scheduler, engine)
            scheduler.max_queue_tokens = 3
            (waiting,) = await queued(scheduler, ["d"])
            with pytest.raises(Overloaded):
                await scheduler.embed(["e"])
            engine.gate.set()
            await asyncio.gather(occupied, waiting)

    asyncio.run(run())


def test_a_query_does_not_wait_for_a_bulk_request():
    async def run() -> None:
        engine = Recorder()
        async with Scheduler(engine, batch_tokens=64) as scheduler:
            occupied = await busy(scheduler, engine)
            bulk = [words(30, tag) for tag in range(40)]
            tasks = await queued(scheduler, bulk, ["query"], ["another"])
            engine.gate.set()
            await asyncio.gather(occupied, *tasks)
        assert [engine.ids("query"), engine.ids("another")] in engine.batches[1:3]  # at most one batch before

    asyncio.run(run())


def test_a_lone_request_does_not_wait_for_others():
    async def run() -> None:
        engine = Recorder(delay_s=0.05)
        async with Scheduler(engine) as scheduler:
            await scheduler.embed(["one"])
            await asyncio.gather(*(scheduler.embed([f"text {i}"]) for i in range(20)))
        assert len(engine.batches[0]) == 1
        assert len(engine.batches) <= 4  # what came while the engine was busy went together

    asyncio.run(run())


def test_the_time_in_the_queue_is_told_apart_from_that_in_the_engine():
    async def run() -> None:
        engine = Recorder()
        async with Scheduler(engine) as scheduler:
            occupied = await busy(scheduler, engine)
            (waiting,) = await queued(scheduler, ["waits"])
            await asyncio.sleep(0.1)
            (late,) = await queued(scheduler, ["waits"])  # the same text: it waited longer than this request
            engine.gate.set()
            first, second, third = await asyncio.gather(occupied, waiting, late)
        assert first.queue_s < 0.05 <= first.forward_s
        assert second.queue_s >= 0.1 > second.forward_s
        assert third.queue_s < 0.1

    asyncio.run(run())


def test_the_batch_size_is_found_at_warm_up_unless_it_is_given():
    class FixedCost(FakeEngine):
        """A call costs what 500 tokens cost: small batches are not worth it."""

        def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
            self.delay_s = 0.005 + 1e-5 * sum(map(len, tokens))
            return super().forward(tokens)

    async def run() -> None:
        async with Scheduler(FixedCost()) as scheduler:
            await scheduler.warm_up()
            assert scheduler.batch_tokens >= 4096
        async with Scheduler(FixedCost(), batch_tokens=300) as scheduler:
            await scheduler.warm_up()
            assert scheduler.batch_tokens == 300

    asyncio.run(run())


def test_overload_is_refused_with_a_computed_wait():
    async def run() -> None:
        engine = Recorder()
        async with Scheduler(engine, max_queue_tokens=100) as scheduler:
            occupied = await busy(scheduler, engine)
            waiting = await queued(scheduler, [words(58, 1)])
            scheduler._rate_tokens, scheduler._rate_seconds = 5.0, 1.0
            with pytest.raises(Overloaded) as refused:
                await scheduler.embed([words(58, 2)])
            assert refused.value.retry_after_s == 4  # 20 tokens too many, at 5 tokens/s
            assert scheduler.counters.requests_shed == 1
            more = await queued(scheduler, [words(38, 3)])  # exactly what fits
            with pytest.raises(Overloaded):
                await scheduler.embed(["tiny"])
            engine.gate.set()
            await asyncio.gather(occupied, *waiting, *more)
            assert (await scheduler.embed(["tiny"])).num_tokens == 3

    asyncio.run(run())


def test_a_request_larger_than_the_queue_is_told_so():
    async def run() -> None:
        async with Scheduler(FakeEngine(), max_queue_tokens=100) as scheduler:
            with pytest.raises(RequestTooLarge, match=r"126 tokens .* 100; split it"):
                await scheduler.embed([words(40, 1), words(40, 2), words(40, 3)])
            await scheduler.embed([words(40, 1)] * 3)  # equal texts need their place once

    asyncio.run(run())


def test_cancelled_requests_leave_the_queue():
    async def run() -> None:
        engine = Recorder()
        async with Scheduler(engine) as scheduler:
            occupied = await busy(scheduler, engine)
            gone, stays = await queued(scheduler, ["gone", "shared"], ["shared", "mine"])
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            assert gone.cancelled()
            assert scheduler.queued_tokens == 6 and scheduler.counters.texts_dropped == 1
            again = (await queued(scheduler, ["gone"]))[0]  # a later wish for the same text is a new one
            occupied.cancel()  # its text runs already: the result is thrown away, and nothing breaks
            await asyncio.gather(occupied, return_exceptions=True)
            engine.gate.set()
            answers = await asyncio.gather(stays, again)
            np.testing.assert_array_equal(answers[0].vectors, alone(engine, ["shared", "mine"]))
            assert scheduler.queued_tokens == 0 and not scheduler._in_flight
        rows = [row for batch in engine.batches for row in batch]
        assert rows.count(engine.ids("gone")) == 1

    asyncio.run(run())


def test_a_text_that_nobody_wants_any_more_is_not_computed():
    async def run() -> None:
        engine = Recorder()
        async with Scheduler(engine) as scheduler:
            occupied = await busy(scheduler, engine)
            gone = (await queued(scheduler, ["gone"]))[0]
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            engine.gate.set()
            await occupied
            await scheduler.embed(["after"])
        assert engine.batches == [[engine.ids("occupied")], [engine.ids("after")]]

    asyncio.run(run())


def test_a_text_dropped_after_its_window_was_cut_is_not_computed():
    class ClosesAfterOneBatch(Recorder):
        def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
            vectors = super().forward(tokens)
            if len(self.batches) == 1:
                self.gate.clear()
            return vectors

    async def run() -> None:
        engine = ClosesAfterOneBatch()
        async with Scheduler(engine, batch_tokens=16) as scheduler:
            occupied = await busy(scheduler, engine)
            first, gone = await queued(scheduler, ["first"], [words(13)])
            engine.gate.set()
            await occupied
            while len(engine.batches) < 2:  # "first" runs, and its window holds the other
                await asyncio.sleep(0.001)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            engine.gate.set()
            await first
            await scheduler.embed(["after"])
        assert engine.batches[1:] == [[engine.ids("first")], [engine.ids("after")]]

    asyncio.run(run())


def test_a_failing_forward_fails_its_batch_alone():
    async def run() -> None:
        engine = Recorder()
        engine.poison = engine.ids("poison")
        async with Scheduler(engine, batch_tokens=16) as scheduler:
            occupied = await busy(scheduler, engine)
            # Shortest first: "poison" with "near" in one batch, the long ones in batches of their own.
            tasks = await queued(scheduler, ["poison", words(12, 1)], ["near"], [words(13, 2)])
            engine.gate.set()
            first, near, far = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(first, ForwardFailed) and isinstance(near, ForwardFailed)
            np.testing.assert_array_equal(far.vectors, alone(engine, [words(13, 2)]))
            assert (await occupied).num_tokens == 3
            assert scheduler.counters.batches_failed == 1 and scheduler.queued_tokens == 0
            assert (await scheduler.embed(["near"])).num_tokens == 3  # the loop lives on

    asyncio.run(run())


def test_wrong_shapes_and_nan_count_as_failures():
    class Broken(FakeEngine):
        def forward(self, tokens):
            return np.full((len(tokens), self.dim if self.dim == 16 else 16), np.nan, dtype=np.float32)

    async def run() -> None:
        for engine in (Broken(), Broken(dim=8)):
            async with Scheduler(engine) as scheduler:
                with pytest.raises(ForwardFailed):
                    await scheduler.embed(["a"])
                with pytest.raises(ValueError, match="NaN"):
                    await scheduler.warm_up()
                assert not scheduler.ready

    asyncio.run(run())


def test_over_long_texts_are_cut_or_refused():
    async def run() -> None:
        engine = FakeEngine(max_tokens=10)
        async with Scheduler(engine) as scheduler:
            assert (await scheduler.embed([words(30)])).num_tokens == 10
            with pytest.raises(TextTooLong, match="text 1 has 32 tokens and the model reads 10") as refused:
                await scheduler.embed(["short", words(30)], truncate=False)
            assert refused.value.index == 1
            assert (await scheduler.embed([words(8)], truncate=False)).num_tokens == 10

    asyncio.run(run())


def test_closing_answers_everybody():
    async def run() -> None:
        engine = Recorder()
        scheduler = Scheduler(engine)
        with pytest.raises(Closed):
            await scheduler.embed(["not started"])
        await scheduler.start()
        await scheduler.warm_up()
        assert scheduler.ready
        occupied = await busy(scheduler, engine)
        waiting = (await queued(scheduler, ["waiting"]))[0]
        await scheduler.close()
        engine.gate.set()
        for result in await asyncio.gather(occupied, waiting, return_exceptions=True):
            assert isinstance(result, Closed)
        assert not scheduler.ready
        with pytest.raises(Closed):
            await scheduler.embed(["too late"])

    asyncio.run(run())


def test_the_probe_notices_a_stuck_engine():
    async def run() -> None:
        engine = Recorder()
        async with Scheduler(engine) as scheduler:
            await scheduler.probe(5)
            occupied = await busy(scheduler, engine)
            with pytest.raises(asyncio.TimeoutError):
                await scheduler.probe(0.05)
            engine.gate.set()
            await occupied
            await scheduler.probe(5)

    asyncio.run(run())


def test_the_speed_is_measured():
    async def run() -> None:
        async with Scheduler(FakeEngine(delay_s=0.02), batch_tokens=100) as scheduler:
            for tag in range(40):
                await scheduler.embed([words(98, tag)])
            assert 1_500 < scheduler.tokens_per_second <= 5_000  # 100 tokens per 20 ms

    asyncio.run(run())
