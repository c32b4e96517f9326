"""The engine's thread goes from batch to batch by itself, and nobody waits for a thread that has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from gist_ray.encoder import TokenIds
from gist_ray.serving.engine import Vectors
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.outcomes import Closed
from gist_ray.serving.scheduler import Scheduler


class Counting(FakeEngine):
    """Counts its forwards, of 20 ms each."""

    def __init__(self) -> None:
        super().__init__(delay_s=0.02)
        self.forwards = 0

    def forward(self, tokens: Sequence[TokenIds]) -> Vectors:
        self.forwards += 1
        return super().forward(tokens)


def test_the_engine_does_not_wait_for_a_busy_event_loop():
    async def run() -> None:
        engine = Counting()
        async with Scheduler(engine, batch_tokens=4) as scheduler:  # a text is a batch
            asked = asyncio.gather(*(scheduler.embed([f"text {i}"]) for i in range(5)))
            while not engine.forwards:
                await asyncio.sleep(0.001)
            time.sleep(0.5)  # the event loop does something else
            assert engine.forwards == 5
            assert scheduler.counters.batches == 0  # nothing was delivered meanwhile
            await asked
            assert scheduler.counters.batches == 5

    asyncio.run(run())


def test_a_probe_gets_its_turn_between_batches():
    async def run() -> None:
        engine = Counting()
        async with Scheduler(engine, batch_tokens=4) as scheduler:
            asked = asyncio.gather(*(scheduler.embed([f"text {i}"]) for i in range(20)))
            while not engine.forwards:
                await asyncio.sleep(0.001)
            await scheduler.probe(5)
            assert engine.forwards < 20
            await asked

    asyncio.run(run())


def test_nobody_waits_for_a_thread_that_has_ended(monkeypatch: pytest.MonkeyPatch):
    """A mistake of ours in the queue, say."""

    async def run() -> None:
        async with Scheduler(Counting()) as scheduler:
            await scheduler.embed(["before"])

            def broken() -> None:
                raise KeyError("a mistake")

            monkeypatch.setattr(scheduler._lanes, "next_batch", broken)
            with pytest.raises(Closed):
                await asyncio.wait_for(scheduler.embed(["a text"]), 5)
            assert not scheduler.ready and scheduler.queued_tokens == 0
            with pytest.raises(Closed):
                await scheduler.probe(5)

    asyncio.run(run())
