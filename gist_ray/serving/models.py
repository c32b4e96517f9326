"""Models: what a replica serves, by the names that clients ask for; changed without dropping a request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gist_ray.serving.engine import Engine
from gist_ray.serving.outcomes import Closed, UnknownModel
from gist_ray.serving.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Served:
    """One model, ready for requests.

    Attributes:
        model_id: the name that clients send as `model`.
        place: the folder or Hub id it came from.
        created: when it was loaded, in seconds since 1970.
    """

    model_id: str
    place: str
    engine: Engine
    scheduler: Scheduler
    created: int


class Models:
    """The models of one replica; the first is the one for requests that name none.

    Args:
        load: a folder or Hub id to an engine; called in a thread beside the event loop.
        schedule: an engine to its scheduler, which this starts, warms and ends.
    """

    def __init__(self, load: Callable[[str], Engine], schedule: Callable[[Engine], Scheduler]) -> None:
        self._load, self._schedule = load, schedule
        self._served: dict[str, Served] = {}
        self._change = asyncio.Lock()

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._served.values()))

    @property
    def ready(self) -> bool:
        """There is a model, and all are warm."""
        return bool(self._served) and all(served.scheduler.ready for served in self)

    def get(self, model_id: str | None = None) -> Served:
        """The model of that name; None: the first. A request that asks it at once is answered by it, even if it goes.

        Raises:
            UnknownModel: there is none of that name.
            Closed: nothing is loaded yet.
        """
        if not self._served:
            raise Closed("the model is not loaded yet")
        if model_id is None:
            return next(iter(self._served.values()))
        if model_id not in self._served:
            known = ", ".join(f"`{name}`" for name in self._served)
            raise UnknownModel(f"the model is not served here; what is served: {known}")
        return self._served[model_id]

    async def replace(self, places: Mapping[str, str]) -> None:
        """Serve these models, by name, and no others. Those at the same place stay as they are.

        New ones are loaded and warmed while the old answer, so both need memory for a while; then names change over at
        once, and the old ones end when they have answered. If one cannot be loaded, nothing changes.

        Raises:
            Exception: whatever loading or warming raises.
        """
        async with self._change:
            wanted: dict[str, Served] = {}
            try:
                for model_id, place in places.items():
                    known = self._served.get(model_id)
                    same = known is not None and known.place == place
                    wanted[model_id] = known if known and same else await self._started(model_id, place)
            except BaseException:
                await self._end(
                    [served for served in wanted.values() if served is not self._served.get(served.model_id)]
                )
                raise
            before, self._served = self._served, wanted
            gone = [served for served in before.values() if served is not wanted.get(served.model_id)]
            for served in gone:
                log.info("%s from %s ends; it answers those who asked it", served.model_id, served.place)
            await asyncio.gather(*(served.scheduler.drain() for served in gone))

    async def probe(self, deadline_s: float) -> None:
        """Run a real forward of each model.

        Raises:
            Closed: there is no model.
            asyncio.TimeoutError: no answer within `deadline_s` seconds.
            Exception: whatever an engine raises.
        """
        if not self._served:
            raise Closed("no model is given: set `models` in the application's args or the deployment's user_config")
        await asyncio.gather(*(served.scheduler.probe(deadline_s) for served in self))

    async def close(self) -> None:
        """End all; who still waits gets Closed."""
        served, self._served = list(self._served.values()), {}
        await self._end(served)

    async def _started(self, model_id: str, place: str) -> Served:
        engine = await asyncio.to_thread(self._load, place)
        scheduler = self._schedule(engine)
        try:
            await scheduler.start()
            await scheduler.warm_up()
        except BaseException:
            await scheduler.close()
            raise
        log.info("%s from %s is ready: %d dimensions, %s", model_id, place, engine.dim, engine.precision)
        return Served(model_id, place, engine, scheduler, int(time.time()))

    @staticmethod
    async def _end(models: list[Served]) -> None:
        for served in models:
            await served.scheduler.close()
