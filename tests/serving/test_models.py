"""Models of a replica: found by name, changed without dropping a request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.models import Models
from gist_ray.serving.outcomes import Closed, UnknownModel
from gist_ray.serving.scheduler import Scheduler


def load(place: str) -> FakeEngine:
    """`dim=8,delay=0.01`: so that an answer tells which model gave it."""
    settings = dict(part.split("=") for part in place.split(","))
    return FakeEngine(dim=int(settings["dim"]), delay_s=float(settings.get("delay", 0)))


def run(
    test: Callable[[Models], Coroutine[Any, Any, None]], load: Callable[[str], FakeEngine] = load, **options: Any
) -> None:
    async def with_models() -> None:
        models = Models(load, partial(Scheduler, batch_tokens=64, **options))
        try:
            await asyncio.wait_for(test(models), 60)
        finally:
            await models.close()

    asyncio.run(with_models())


def test_models_are_found_by_name_and_the_first_is_for_those_who_name_none():
    async def test(models: Models) -> None:
        with pytest.raises(Closed):
            models.get()
        assert not models.ready
        await models.replace({"b": "dim=8", "a": "dim=4"})
        assert models.ready and [served.model_id for served in models] == ["b", "a"]
        assert models.get() is models.get("b") and models.get("a").engine.dim == 4
        with pytest.raises(UnknownModel, match="`b`, `a`"):
            models.get("c")
        await models.probe(10)

    run(test)


def test_no_request_is_dropped_while_a_model_is_swapped():
    async def test(models: Models) -> None:
        await models.replace({"m": "dim=8,delay=0.01"})
        first, over, dims = models.get(), False, []

        async def client(number: int) -> None:
            for turn in range(10_000):
                if over:
                    return
                found = await models.get("m").scheduler.embed([f"{number} {turn}", "same"])
                dims.append(found.vectors.shape[1])

        clients = [asyncio.create_task(client(number)) for number in range(20)]
        await asyncio.sleep(0.1)
        await models.replace({"m": "dim=16,delay=0.01"})
        swapped = len(dims)
        await asyncio.sleep(0.1)
        over = True
        await asyncio.gather(*clients)
        assert dims[0] == 8 and set(dims[:swapped]) <= {8, 16}
        assert len(dims) > swapped and set(dims[swapped:]) == {16}
        with pytest.raises(Closed):
            await first.scheduler.embed(["too late"])

    run(test)


def test_who_asked_the_old_model_is_answered_by_it():
    async def test(models: Models) -> None:
        await models.replace({"m": "dim=8,delay=0.2"})
        asking = asyncio.create_task(models.get().scheduler.embed([f"text {i}" * 30 for i in range(4)]))
        reading = asyncio.create_task(models.get().scheduler.pieces(["a b"], prompt="", special=True))
        await asyncio.sleep(0)  # both have asked, neither has an answer
        await models.replace({"m": "dim=16"})
        assert asking.done() and (await asking).vectors.shape == (4, 8)
        assert reading.done() and len((await reading)[0]) == 4

    run(test)


def test_what_stays_is_not_loaded_again():
    loaded = []

    def counted(place: str) -> FakeEngine:
        loaded.append(place)
        return load(place)

    async def test(models: Models) -> None:
        await models.replace({"a": "dim=8", "b": "dim=4"})
        a, b = models.get("a"), models.get("b")
        await models.replace({"b": "dim=4", "a": "dim=6"})
        assert loaded == ["dim=8", "dim=4", "dim=6"]
        assert models.get() is b and models.get("a") is not a
        assert b.scheduler.ready and not a.scheduler.ready
        await models.replace({"c": "dim=6"})  # another name is another model: its numbers are counted apart
        assert [served.model_id for served in models] == ["c"] and not b.scheduler.ready

    run(test, load=counted)


def test_if_one_cannot_be_loaded_nothing_changes():
    started, closed = [], []

    class Noted(Scheduler):
        async def start(self) -> None:
            started.append(self)
            await super().start()

        async def close(self) -> None:
            closed.append(self)
            await super().close()

    class Broken(FakeEngine):
        def forward(self, tokens):
            raise RuntimeError("broken weights")

    def some_broken(place: str) -> FakeEngine:
        if place == "absent":
            raise FileNotFoundError(place)
        return Broken() if place == "broken" else load(place)

    async def test() -> None:
        models = Models(some_broken, Noted)
        await models.replace({"a": "dim=8"})
        kept = models.get()
        for place, error in (("absent", FileNotFoundError), ("broken", RuntimeError)):
            with pytest.raises(error):
                await models.replace({"a": "dim=4", "b": place})
            assert [served for served in models] == [kept]
            assert (await kept.scheduler.embed(["still here"])).vectors.shape == (1, 8)
        # Of the first change one was warm when the other could not be loaded, of the second one failed when warm.
        assert (
            len(started) == 4
            and started[0] is kept.scheduler
            and sorted(map(id, closed)) == sorted(map(id, started[1:]))
        )
        await models.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_models_of_a_replica_compute_in_turn():
    busy, overlaps = threading.Lock(), []

    class Alone(FakeEngine):
        def forward(self, tokens):
            free = busy.acquire(blocking=False)
            overlaps.append(not free)
            time.sleep(0.002)
            if free:
                busy.release()
            return super().forward(tokens)

    async def test(models: Models) -> None:
        await models.replace({"a": "x", "b": "y"})
        asks = [models.get(name).scheduler.embed([f"{i} {name} " * 20]) for i in range(40) for name in ("a", "b")]
        await asyncio.gather(*asks)
        assert len(overlaps) > 20 and not any(overlaps)

    run(test, load=lambda place: Alone(), turn=threading.Lock())


def test_changes_come_one_after_the_other():
    def slowly(place: str) -> FakeEngine:
        engine = load(place)
        time.sleep(0.4 / engine.dim)  # the last one would be the first
        return engine

    async def test(models: Models) -> None:
        await asyncio.gather(*(models.replace({"m": f"dim={dim}"}) for dim in (4, 8, 16)))
        assert models.get().engine.dim == 16 and models.ready

    run(test, load=slowly)


def test_without_a_model_a_replica_is_not_healthy():
    async def test(models: Models) -> None:
        with pytest.raises(Closed, match="user_config"):
            await models.probe(1)

    run(test)
