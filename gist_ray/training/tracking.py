"""Tracking: a training run's own log, sent on to the trackers of its recipe by the driver.

The files of the run are the queue. A server that is slow or gone never holds up training and costs no memory; once it
is back, it gets what it missed. Only the driver needs the packages, the network and the credentials.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_ray.config import Recipe
from gist_ray.errors import InputError
from gist_ray.manifest import write_json
from gist_ray.metrics import EVENTS, METRICS, TRACKER_STATES, VALIDATIONS, Line, Tail, scalars
from gist_ray.training.trackers import Tracker, trackers_of, without_password

log = logging.getLogger(__name__)

_SEND_EVERY_S = 2.0
_RETRY_EVERY_S = 30.0
_LAST_SEND_S = 30.0
_LINES_AT_ONCE = 200


def check_trackers(recipe: Recipe) -> None:
    """Reach every tracker of a recipe, before machines are asked for.

    Raises:
        InputError: a package is missing, a server does not answer, or it knows nobody of these credentials.
    """
    for tracker in trackers_of(recipe):
        section = f"tracking.{tracker.name}"
        try:
            tracker.check()
        except ImportError as error:
            raise InputError(
                f"{section} needs a package ({error}); run `pip install {tracker.package}`, or remove {section}"
            ) from error
        except Exception as error:  # each package has many kinds
            raise InputError(
                f"{section}: cannot log to {tracker.place()}: {_brief(error)}; correct {section} or the environment, "
                "or remove that section"
            ) from error


@contextmanager
def tracked(recipe: Recipe, run_dir: Path) -> Iterator[None]:
    """Send what training writes to `run_dir` on to the trackers of a recipe, while the block runs.

    It never raises for a tracker: one that fails is warned of once and tried again every 30 s. A step is sent once,
    also if a restart repeats it. The id of the tracker's run and the step reached are kept in `run_dir`, so that a
    resumed driver continues the same run; `gist_ray.metrics.remove_logs` ends that.
    """
    senders = [_Sender(tracker, run_dir) for tracker in trackers_of(recipe)]
    for sender in senders:
        sender.start()
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        for sender in senders:
            sender.finish(succeeded)
        deadline = time.monotonic() + _LAST_SEND_S
        for sender in senders:
            sender.join(max(0.0, deadline - time.monotonic()))
            if sender.is_alive():
                log.warning("%s did not take the last metrics in time; %s has them", sender.place, run_dir / METRICS)


@dataclass
class _Events:
    """A file of events, and how many of them were read."""

    tail: Tail
    name: str
    read: int = 0


class _Sender(threading.Thread):
    """One tracker's thread: a server that hangs must not hold up another one."""

    def __init__(self, tracker: Tracker, run_dir: Path) -> None:
        super().__init__(daemon=True, name=f"gist-ray-{tracker.name}")
        self.place = tracker.place()
        self._tracker, self._run_dir = tracker, run_dir
        self._state_file = run_dir / TRACKER_STATES.replace("*", tracker.name)
        self._state = self._read_state()
        self._metrics = Tail(run_dir / METRICS)
        self._events = [_Events(Tail(run_dir / name), name) for name in (EVENTS, VALIDATIONS)]
        self._pending: list[Line] = []
        self._ended = threading.Event()
        self._open = self._warned = self._succeeded = False

    def run(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            pause = _SEND_EVERY_S if self._works(self._send_new) else _RETRY_EVERY_S
        if self._works(self._send_new):
            self._works(lambda: self._tracker.close(self._succeeded))

    def finish(self, succeeded: bool) -> None:
        """Send the rest and end."""
        self._succeeded = succeeded
        self._ended.set()

    def _works(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:
            self._open = False  # the connection may be what is broken
            if not self._warned:
                self._warned = True
                log.warning("%s takes no metrics, training goes on: %s", self.place, _brief(error))
            return False
        return True

    def _send_new(self) -> None:
        if not self._open:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._state["run"] = self._tracker.open(self._state["run"], self._run_dir)
            self._open = True
            self._keep_state()
        while self._pending or self._read():
            self._tracker.send([(int(line["step"]), scalars(line)) for line in self._pending])
            steps = [int(line["step"]) for line in self._pending if "event" not in line]
            self._state["step"] = max([self._state["step"], *steps])
            self._state["events"] |= {events.name: events.read for events in self._events}
            self._pending = []
            self._keep_state()

    def _read(self) -> bool:
        self._pending = list(itertools.islice(self._unsent(), _LINES_AT_ONCE))
        return bool(self._pending)

    def _unsent(self) -> Iterator[Line]:
        """Steps that were not reached before, and events that are new: those are never taken back, so a count tells."""
        for line in self._metrics.new_lines():
            if line["step"] > self._state["step"]:
                yield line
        for events in self._events:
            for line in events.tail.new_lines():
                events.read += 1
                if events.read > self._state["events"].get(events.name, 0):
                    yield line

    def _read_state(self) -> dict[str, Any]:
        new: dict[str, Any] = {"place": self.place, "run": None, "step": 0, "events": {}}
        try:
            state: dict[str, Any] = json.loads(self._state_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return new
        return state if state.keys() == new.keys() and state["place"] == self.place else new

    def _keep_state(self) -> None:
        write_json(self._state_file, self._state)


def _brief(error: Exception) -> str:
    """The first line of an error that may hold pages, and a server's address with a password."""
    lines = str(error).strip().splitlines() or [""]
    return without_password(f"{type(error).__name__}: {lines[0][:500]}")
