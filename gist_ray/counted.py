"""Counted: how much of a stage is done, while it runs. A bar on a terminal; in a job's log, lines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

T = TypeVar("T")


def counted(parts: Iterable[T], total: int, stage: str, unit: str, *, every_s: float = 30.0) -> Iterator[T]:
    """Yield the parts as they come, and say how many have.

    A stage that is done sooner than `every_s` says nothing; the last part is left to what the stage says of itself.

    Args:
        parts: finished parts of the stage.
        total: how many there will be.
        stage: what is being done, such as `guide vectors`.
        unit: what a part is, in the singular.
        every_s: seconds between lines, where stderr is no terminal.
    """
    if sys.stderr.isatty():
        yield from tqdm(parts, total=total, desc=stage, unit=unit)
        return
    begun = said = time.monotonic()
    for done, part in enumerate(parts, start=1):
        now = time.monotonic()
        if now - said >= every_s and done < total:
            left_s = (now - begun) / done * (total - done)
            log.info("%s: %d of %d %ss, about %s left", stage, done, total, unit, duration(left_s))
            said = now
        yield part


def duration(seconds: float) -> str:
    """Seconds as `minutes:seconds`, or `hours:minutes:seconds`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
