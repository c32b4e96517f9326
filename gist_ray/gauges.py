"""Gauges on the endpoint that every Ray node exports for Prometheus."""

from __future__ import annotations

import threading
from typing import Any

_REPEAT_S = 3.0


class Gauges:
    """Values that are there until `close`, or until the process ends.

    Ray forgets a gauge that is not set again within two of its intervals (20 s), and many of ours change more seldom:
    the score of a checkpoint, tasks that run for minutes, a step that hangs. A thread sets them again and again.

    Args:
        prefix: of all names. Ray puts `ray_` before it, and sends values on at its own interval (10 s).
        tags: of every gauge, with their values.
    """

    def __init__(self, prefix: str, **tags: str) -> None:
        self._prefix, self._tags = prefix, tags
        self._gauges: dict[str, Any] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        threading.Thread(target=self._repeat, daemon=True, name="gist-ray-gauges").start()

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge; one name has the same tags each time."""
        from ray.util.metrics import Gauge

        with self._lock:
            if name not in self._gauges:
                names = (*self._tags, *tags)
                self._gauges[name] = Gauge(self._prefix + name, f"`{name}` of gist-ray", names)
            self._values[name, tuple(tags.items())] = value
            self._gauges[name].set(value, {**self._tags, **tags})

    def close(self) -> None:
        """Let Ray forget them."""
        self._over.set()

    def _repeat(self) -> None:
        while not self._over.wait(_REPEAT_S):
            with self._lock:
                for (name, tags), value in self._values.items():
                    self._gauges[name].set(value, {**self._tags, **dict(tags)})
