"""Metrics of a training run: one line a step, written by worker 0 and read by whoever shows or draws them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
VALIDATIONS = "validation.jsonl"
"""Events too, in a file of their own: another process scores checkpoints, and a file has one writer."""
TENSORBOARD = "tensorboard"
TRACKER_STATES = "tracker-*.json"
"""Which run of a tracker this run is, and how far it has got: `training/tracking.py`."""

Line = dict[str, Any]
"""A step: `step`, numbers, and `phases`, a mapping of phase to seconds, one for each rank. Or an event, which has its
kind in `event`. Any key but `step` may be missing."""

_NO_CURVES = {"step", "total_steps", "time", "clock_s", "rows_crc32"}  # when it was, and which rows: not how it went

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Somewhere else that lines go, from within the worker."""

    def log(self, line: Line) -> None:
        """Take a step or an event."""

    def close(self) -> None:
        """No more lines will come."""


class MetricsLog:
    """`metrics.jsonl`, `events.jsonl` and TensorBoard files of a run; sinks are told of its validations too.

    On resume the lines of steps after the checkpoint are taken back, since those steps are done again. Events are the
    run's history: they stay, and one tells how many steps were taken back.

    A sink that fails is warned of once and left out from then on: watching a run never stops it.
    """

    def __init__(self, run_dir: Path, start_step: int, sinks: Sequence[Sink] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._metrics, self._events = run_dir / METRICS, run_dir / EVENTS
        self._sinks = list(sinks)
        taken_back = _take_back(self._metrics, start_step)
        _end_line(self._events)
        # Also at step 0: a run that died before its first checkpoint has left a curve there.
        self._board = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=start_step + 1)
        self._validations = Tail(run_dir / VALIDATIONS)
        for _ in self._validations.new_lines():
            pass  # the worker that this one replaces has told those
        if taken_back:
            self.write_event({"step": start_step, "event": "taken_back", "steps": taken_back})

    def write(self, metrics: Line) -> None:
        """Append the line of a step. Seconds of phases are kept to the microsecond: most of a line are those."""
        phases = {name: [round(s, 6) for s in seconds] for name, seconds in metrics.get("phases", {}).items()}
        self._write(self._metrics, {**metrics, "phases": phases} if phases else metrics)

    def write_event(self, event: Line) -> None:
        """Append an event: `step`, its kind in `event`, and what else there is to say. The time is added."""
        self._write(self._events, {"time": round(time.time(), 3), **event})

    def close(self) -> None:
        """Flush the TensorBoard file and close the sinks."""
        self._tell_validations()
        self._board.close()
        for sink in self._sinks[:]:
            self._guarded(sink, sink.close)

    def _write(self, file: Path, line: Line) -> None:
        with file.open("a", encoding="utf-8") as stream:  # opened anew: NFS shows others a file once it is closed
            stream.write(json.dumps(line) + "\n")
        self._tell(line)
        self._tell_validations()

    def _tell_validations(self) -> None:
        for event in self._validations.new_lines():
            self._tell_sinks(event)

    def _tell(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self._board.add_scalar(name, value, int(line["step"]))
        self._tell_sinks(line)

    def _tell_sinks(self, line: Line) -> None:
        for sink in self._sinks[:]:
            self._guarded(sink, sink.log, line)

    def _guarded(self, sink: Sink, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            log.warning("%s takes no more metrics: %s: %s", type(sink).__name__, type(error).__name__, error)
            self._sinks.remove(sink)


def add_validation(run_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Append the scores of the checkpoint of `step` to `validation.jsonl` and to the run's TensorBoard files.

    They are a TensorBoard run of their own, `validation`: a folder has one writer, and the last checkpoints are scored
    when worker 0 and its log have ended.
    """
    from torch.utils.tensorboard import SummaryWriter

    event = {"time": round(time.time(), 3), "step": step, "event": "validation", **metrics}
    with (run_dir / VALIDATIONS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(event) + "\n")
    with SummaryWriter(str(run_dir / TENSORBOARD / "validation")) as board:
        for name, value in scalars(event).items():
            board.add_scalar(name, value, step)


class Tail:
    """What is appended to a file of JSON lines, from where the last look ended.

    A file that was replaced (a restart takes lines back) is read from its start again; `replaced` counts how often.
    """

    def __init__(self, file: Path) -> None:
        self.replaced = 0
        self._file = file
        self._identity: tuple[int, int] | None = None
        self._offset = 0

    def new_lines(self) -> Iterator[Line]:
        """Yield the whole lines that are new. One that is still being written is left for the next look."""
        try:
            stream = self._file.open("rb")
        except FileNotFoundError:
            return
        with stream:
            status = os.fstat(stream.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._identity is not None and (identity != self._identity or status.st_size < self._offset):
                self.replaced += 1
                self._offset = 0
            self._identity = identity
            stream.seek(self._offset)
            for raw in stream:
                if not raw.endswith(b"\n"):
                    return
                self._offset += len(raw)
                try:
                    yield json.loads(raw)
                except ValueError:  # a line that a kill cut short, and others after it
                    continue


def read_metrics(file: Path) -> list[Line]:
    """Lines of any of a run's files; one that a kill cut short is left out."""
    return list(iter_metrics(file))


def iter_metrics(file: Path) -> Iterator[Line]:
    """Yield the lines that `read_metrics` returns one by one: those of a long run on many ranks fill the memory."""
    if file.is_file():
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue


def remove_logs(run_dir: Path) -> None:
    """Remove what an earlier run left in a folder, so that a new one starts with empty curves and trackers."""
    for file in (*(run_dir / name for name in (METRICS, EVENTS, VALIDATIONS)), *run_dir.glob(TRACKER_STATES)):
        file.unlink(missing_ok=True)
    shutil.rmtree(run_dir / TENSORBOARD, ignore_errors=True)


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line under flat names, for trackers that know no ranks.

    Of a phase the mean over ranks and the maximum, which is what the step waits for: `phase/forward/mean`,
    `phase/forward/max`. Numbers of an event are named by its kind: `validation/score`. Steps and times say when it was,
    not how it went, and are left out.
    """
    prefix = f"{line['event']}/" if "event" in line else ""
    flat = {
        f"{prefix}{name}": float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and name not in _NO_CURVES
    }
    for phase, seconds in line.get("phases", {}).items():
        if seconds:
            flat[f"phase/{phase}/mean"] = sum(seconds) / len(seconds)
            flat[f"phase/{phase}/max"] = float(max(seconds))
    return flat


def _take_back(file: Path, start_step: int) -> int:
    """Keep the lines up to a step and return how many steps the others were on.

    By rename, so that a kill in between loses nothing, and a reader sees that the file is another one.
    """
    last, kept = start_step, file.with_name(f".{file.name}.kept")
    with kept.open("w", encoding="utf-8") as stream:
        for line in iter_metrics(file):
            last = max(last, int(line["step"]))
            if line["step"] <= start_step:
                stream.write(json.dumps(line) + "\n")
    kept.replace(file)
    return last - start_step


def _end_line(file: Path) -> None:
    """End a line that a kill cut short, so that the next one stands alone."""
    with file.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
