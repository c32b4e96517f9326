"""Time spent: where the time of a run's steps went, by phase and by rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gist_ray.metrics import Line
from gist_ray.training.phases import PHASES

Floats = npt.NDArray[np.float64]

EXCHANGES = ("gather", "reduce")
"""Phases in which ranks meet, so that who comes first waits for who comes last."""

_SAMPLED_VALUES = 2_000_000  # for medians; sums are exact. 8 MB
_LINES_AT_ONCE = 256


@dataclass(frozen=True)
class PhaseTime:
    """One phase over a run."""

    name: str
    share: float
    """Of the time of all steps; the mean over ranks."""
    median_s: float
    """Over ranks and the steps that have the phase."""
    p95_s: float
    rank_mean_s: Floats
    """Seconds of a mean step, `[ranks]`."""
    rank_median_s: Floats
    """Of the steps that have the phase, `[ranks]`; 0 on a rank that never had it."""

    def slowest(self) -> tuple[int, float] | None:
        """The slowest rank, and how many times the median of the others it takes; None where there are no others."""
        if len(self.rank_median_s) < 2:
            return None
        rank = int(self.rank_median_s.argmax())
        others = float(np.median(np.delete(self.rank_median_s, rank)))
        return (rank, float(self.rank_median_s[rank]) / others) if others > 0 else None


@dataclass(frozen=True)
class TimeSpent:
    """Where the time of the steps went."""

    phases: list[PhaseTime]
    """In the order of a step."""
    step_s: float
    """Mean."""
    untimed: float
    """Share of the steps that is in no phase."""
    waiting: float
    """Share of the steps that ranks spend in exchanges beyond what the last to arrive does: waiting for it."""

    def share(self, name: str) -> float:
        """Share of a phase; 0 if it was not logged."""
        return next((phase.share for phase in self.phases if phase.name == name), 0.0)


class TimeSums:
    """Adds up lines of metrics. Memory does not grow with the number of steps."""

    def __init__(self) -> None:
        self._names = list(PHASES)  # and others in the order of their coming
        self._block: list[list[list[float]]] = []  # [lines][phases][ranks]: one array op for many lines
        self._block_seconds: list[float] = []
        self._sums: Floats = np.zeros((0, 0))  # [phases, ranks]
        self._means: Floats = np.zeros(0)  # [phases]
        self._rank_steps: Floats = np.zeros(0)
        self._seconds = self._waiting = 0.0
        self._lines = 0
        self._sample: list[npt.NDArray[np.float32]] = []  # [lines, phases, ranks]; 0 where a step has not the phase
        self._every = 1

    def add(self, line: Line) -> None:
        """Count a step; one without phases is left out."""
        phases = {name: seconds for name, seconds in line.get("phases", {}).items() if seconds}
        if not phases:
            return
        self._names += [name for name in phases if name not in self._names]
        ranks = max(map(len, phases.values()))
        shape = (len(self._names), ranks)
        if self._block and (len(self._block[0]), len(self._block[0][0])) != shape:
            self._flush()
        self._block.append([phases[name] if name in phases else [0.0] * ranks for name in self._names])
        self._block_seconds.append(line.get("seconds") or 0.0)
        if len(self._block) == _LINES_AT_ONCE:
            self._flush()

    def result(self) -> TimeSpent | None:
        """What was added up; None if no line had phases."""
        self._flush()
        if not self._seconds:
            return None
        phases = [self._phase(place) for place, total in enumerate(self._means) if total > 0]
        return TimeSpent(
            phases=phases,
            step_s=self._seconds / self._lines,
            untimed=max(0.0, 1 - sum(phase.share for phase in phases)),
            waiting=self._waiting / self._seconds,
        )

    def _flush(self) -> None:
        if not self._block:
            return
        times = np.array(self._block)  # [lines, phases, ranks]
        means = times.mean(axis=2)
        self._seconds += float(np.maximum(means.sum(axis=1), self._block_seconds).sum())
        self._means = _added(self._means, means.sum(axis=0))
        self._sums = _added(self._sums, times.sum(axis=0))
        self._rank_steps = _added(self._rank_steps, np.full(times.shape[2], len(times), np.float64))
        met = [self._names.index(name) for name in EXCHANGES]
        self._waiting += float((means[:, met] - times[:, met].min(axis=2)).sum())
        self._keep(times)
        self._block, self._block_seconds = [], []

    def _keep(self, times: Floats) -> None:
        """Keep every line for the medians, and from a size on every second, fourth, and so on."""
        self._sample.append(times[-self._lines % self._every :: self._every].astype(np.float32))
        self._lines += len(times)
        while sum(block.size for block in self._sample) > _SAMPLED_VALUES:
            self._sample, self._every = _every_second(self._sample), self._every * 2

    def _phase(self, place: int) -> PhaseTime:
        ranks = len(self._rank_steps)
        blocks = [block[:, place] for block in self._sample if place < block.shape[1]]  # [lines, ranks] each
        columns = [np.concatenate([block[:, rank] for block in blocks if rank < block.shape[1]])
                   for rank in range(ranks)]  # fmt: skip
        columns = [column[column > 0] for column in columns]
        there = np.concatenate(columns)
        return PhaseTime(
            name=self._names[place],
            share=float(self._means[place]) / self._seconds,
            median_s=_quantile(there, 0.5),
            p95_s=_quantile(there, 0.95),
            rank_mean_s=self._sums[place] / self._rank_steps,
            rank_median_s=np.array([_quantile(column, 0.5) for column in columns]),
        )


def _every_second(blocks: list[npt.NDArray[np.float32]]) -> list[npt.NDArray[np.float32]]:
    """Every second line of all blocks together."""
    kept, lines = [], 0
    for block in blocks:
        kept.append(block[lines % 2 :: 2].copy())  # a view would keep the whole block alive
        lines += len(block)
    return kept


def _quantile(values: npt.NDArray[np.float32], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else 0.0


def _added(a: Floats, b: Floats) -> Floats:
    """Sum of arrays of unequal sizes: the smaller one has zeros at its ends."""
    total = np.zeros(np.maximum(a.shape, b.shape))
    for part in (a, b):
        total[tuple(slice(size) for size in part.shape)] += part
    return total
