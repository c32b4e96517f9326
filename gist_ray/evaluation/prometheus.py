"""Prometheus: how far an evaluation is, and what its actors embed, on the endpoint that every Ray node exports."""

from __future__ import annotations

from gist_ray.gauges import Gauges

_PREFIX = "gist_ray_evaluation_"


class TaskCounts:
    """Gauges `gist_ray_evaluation_tasks{model, state}`: tasks of a run that are waiting, running, done or failed.

    Tasks that an earlier run has scored are in none of them. It lives in the driver.
    """

    def __init__(self, model: str) -> None:
        self._gauges = Gauges(_PREFIX, model=model)
        self._ended = {"done": 0, "failed": 0}

    def at_work(self, waiting: int, running: int) -> None:
        """So many wait, and so many run."""
        for state, count in {"waiting": waiting, "running": running, **self._ended}.items():
            self._gauges.set("tasks", count, state=state)

    def ended(self, *, failed: bool = False) -> None:
        """One more is done, or has failed for good. Shown with the next `at_work`."""
        self._ended["failed" if failed else "done"] += 1

    def close(self) -> None:
        """The run is over: the gauges end in some seconds."""
        self._gauges.close()


class TextCounts:
    """Gauges `gist_ray_evaluation_texts{model, source}`: texts whose vectors an actor has computed, or had cached.

    They grow as counters do. Ray's counters cannot begin at 0, and the first texts, in a short run all of them, would
    be in no rate. Equal texts of one call are counted once.
    """

    def __init__(self, model: str) -> None:
        self._gauges = Gauges(_PREFIX, model=model)
        self._texts = {"computed": 0, "cache": 0}
        self.embedded(computed=0, cached=0)

    def embedded(self, *, computed: int, cached: int) -> None:
        """So many texts of a call."""
        self._texts["computed"] += computed
        self._texts["cache"] += cached
        for source, count in self._texts.items():
            self._gauges.set("texts", count, source=source)
