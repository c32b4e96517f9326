"""Phases: where the seconds of a step go, on each worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward", "gather", "loss", "backward", "reduce", "optimizer", "checkpoint")


class PhaseClock:
    """Seconds of each phase since the last `read`. On a GPU it waits for the kernels of a phase at its end."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device and device.type == "cuda" else None
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside the block for `phase`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, started)

    def add(self, phase: str, started: float) -> None:
        """Count the time since `started`, of `time.perf_counter`, for `phase`."""
        if self._device:
            torch.cuda.synchronize(self._device)
        self._seconds[phase] += time.perf_counter() - started

    def read(self) -> list[float]:
        """Seconds of each of `PHASES`, which start again at 0."""
        seconds = [self._seconds[phase] for phase in PHASES]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return seconds
