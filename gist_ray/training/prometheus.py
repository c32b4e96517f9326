"""Prometheus: metrics of a training run on the endpoint that every Ray node exports already."""

from __future__ import annotations

import re
from typing import Any

from gist_ray.gauges import Gauges
from gist_ray.metrics import Line

_PREFIX = "gist_ray_train_"
_NOT_SHOWN = {"time", "clock_s", "rows_crc32"}


class RayMetrics:
    """Sink for `MetricsLog`: gauges under the names of `metrics.jsonl`, tagged with the run.

    `gist_ray_train_loss{run}` and so on, `gist_ray_train_validation_score{run}` of events,
    `gist_ray_train_phase_seconds{run, phase, rank}`, and the counters `gist_ray_train_steps_total{run}`,
    `gist_ray_train_examples_total{run}` and `gist_ray_train_events_total{run, event}`. Ray puts `ray_` before each
    name, and sends them on at its own interval (10 s). A gauge that is there belongs to a run that runs; counters stay.
    Steps that a restart repeats are counted again: work was done. Scores by task are left out: their names are not
    Prometheus's.

    It lives in a worker of Ray; worker 0 has the seconds of all ranks, so it reports for all.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges = Gauges(_PREFIX, run=run)
        self._counters: dict[str, Any] = {}
        self._step: int | None = None

    def log(self, line: Line) -> None:
        """Set the gauges to a line's numbers, and count it."""
        event = line.get("event")
        if event is not None:
            self._count("events_total", 1, event=str(event))
        else:
            self._count_steps(line)
        for name, value in line.items():
            if isinstance(value, int | float) and name not in _NOT_SHOWN and "/" not in name:
                self._set(f"{event}_{name}" if event else name, value)
        for phase, seconds in line.get("phases", {}).items():
            for rank, value in enumerate(seconds):
                self._set("phase_seconds", value, phase=str(phase), rank=str(rank))

    def close(self) -> None:
        """No more lines will come: the gauges end in some seconds, the counters with Ray."""
        self._gauges.close()

    def _count_steps(self, line: Line) -> None:
        """Lines come every `train.log_steps` steps; before the first one nobody knows how many steps it stands for."""
        steps = 1 if self._step is None else line["step"] - self._step
        self._step = line["step"]
        if steps > 0:
            self._count("steps_total", steps)
            if line.get("batch_size"):
                self._count("examples_total", steps * line["batch_size"])

    def _set(self, name: str, value: float, **tags: str) -> None:
        self._gauges.set(_metric(name), value, **tags)

    def _count(self, name: str, value: float, **tags: str) -> None:
        from ray.util.metrics import Counter

        if name not in self._counters:
            self._counters[name] = Counter(_PREFIX + name, f"`{name}` of training", ("run", *tags))
        self._counters[name].inc(value, {"run": self._run, **tags})


def _metric(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII)
