"""Progress: a training run's own log, shown while it grows.

Workers may sit on other nodes; the file of metrics is where all can see how far they are.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from gist_ray.counted import duration
from gist_ray.metrics import Line, Tail

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


@contextmanager
def progress(metrics_file: Path, total_steps: int, *, every_s: float = 30.0) -> Iterator[None]:
    """Show the steps of a run while the block runs: as a bar where stderr is a terminal, else as lines of the log.

    A restart takes the bar back to the step of the checkpoint, and is said in a line of its own.

    Args:
        metrics_file: `metrics.jsonl` of the run; it need not exist yet, and any key but `step` may be missing in it.
        total_steps: optimizer steps of the whole run.
        every_s: seconds between lines of the log. The last step is always logged.
    """
    view = _Bar(total_steps) if sys.stderr.isatty() else _Lines(total_steps, every_s)
    stop, follower = threading.Event(), _Follower(metrics_file, view)

    def follow() -> None:
        while not stop.wait(_LOOK_EVERY_S):
            follower.look()

    thread = threading.Thread(target=follow, daemon=True, name="gist-ray-progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        follower.look()
        view.close()


class _Follower:
    """Reads what is new and tells a view."""

    def __init__(self, metrics_file: Path, view: _Bar | _Lines) -> None:
        self._tail, self._view = Tail(metrics_file), view
        self._replaced = 0
        self._step: int | None = None

    def look(self) -> None:
        try:
            newest = deque(self._tail.new_lines(), maxlen=1)
        except OSError as error:  # storage that is away for a moment must not end the run
            log.debug("no progress to show: %s", error)
            return
        if self._tail.replaced > self._replaced:
            self._replaced = self._tail.replaced
            self._restarted(int(newest[-1]["step"]) if newest else 0)
        if newest:
            self._step = int(newest[-1]["step"])
            self._view.show(self._step, _facts(newest[-1]))

    def _restarted(self, step: int) -> None:
        if self._step is None:
            return  # nothing was shown yet: this is how the run starts
        again = f"; {self._step - step} steps are done again" if step < self._step else ""
        self._view.note(f"train: restarted at step {step}{again}", step)
        self._step = step


class _Bar:
    """A bar on a terminal."""

    def __init__(self, total_steps: int) -> None:
        # tqdm's own rate would count repeated steps; the run knows its rate and what is left.
        self._bar = tqdm(total=total_steps, desc="train", unit="step", file=sys.stderr, bar_format=_BAR)

    def show(self, step: int, facts: str) -> None:
        self._bar.n = step
        self._bar.set_postfix_str(facts)

    def note(self, text: str, step: int) -> None:
        self._bar.write(text, file=sys.stderr)
        self.show(step, "")

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """Lines of the log, not more than one in `every_s` seconds but for the last step and for restarts."""

    def __init__(self, total_steps: int, every_s: float) -> None:
        self._total_steps, self._every_s = total_steps, every_s
        self._due = 0.0
        self._pending: str | None = None

    def show(self, step: int, facts: str) -> None:
        self._pending = f"train: step {step} of {self._total_steps}" + (f", {facts}" if facts else "")
        if time.monotonic() >= self._due:
            self._say()

    def note(self, text: str, step: int) -> None:
        self._pending = None
        log.info("%s", text)

    def close(self) -> None:
        self._say()

    def _say(self) -> None:
        if self._pending is not None:
            log.info("%s", self._pending)
            self._pending, self._due = None, time.monotonic() + self._every_s


def _facts(line: Line) -> str:
    """The few numbers of a line that one wants to see while waiting."""
    shown = {"loss": "loss {:.3f}", "masked_share": "masked {:.1%}", "tokens_per_s": "{:,.0f} tokens/s"}
    facts = [text.format(line[name]) for name, text in shown.items() if line.get(name) is not None]
    if math.isfinite(line.get("eta_s", math.nan)):
        facts.append(f"{duration(line['eta_s'])} left")
    return ", ".join(facts)
