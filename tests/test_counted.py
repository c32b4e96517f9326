"""Counted: lines of the log that are few and true, and a bar on a terminal."""

import fcntl
import io
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from gist_ray import counted as module
from gist_ray.counted import counted, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a stage in a job's log sees, in a list of one number."""
    monkeypatch.setattr(module.sys, "stderr", io.StringIO())
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def parts(clock: list[float], seconds: list[float]) -> Iterator[int]:
    for number, each in enumerate(seconds):
        clock[0] += each
        yield number


def lines(caplog: pytest.LogCaptureFixture, clock: list[float], seconds: list[float]) -> list[str]:
    with caplog.at_level(logging.INFO, logger="gist_ray"):
        assert list(counted(parts(clock, seconds), len(seconds), "guide vectors", "block")) == list(range(len(seconds)))
    return [record.getMessage() for record in caplog.records]


def test_a_long_stage_says_how_much_is_done_and_left(caplog, clock):
    assert lines(caplog, clock, [20.0] * 6) == [
        "guide vectors: 2 of 6 blocks, about 1:20 left",  # two in 40 s: the other four in 80
        "guide vectors: 4 of 6 blocks, about 0:40 left",
    ]


def test_what_was_there_already_shortens_what_is_left(caplog, clock):
    assert lines(caplog, clock, [0.0, 0.0, 0.0, 60.0, 0.0]) == ["guide vectors: 4 of 5 blocks, about 0:15 left"]


def test_a_short_stage_and_the_last_part_say_nothing(caplog, clock):
    assert lines(caplog, clock, [5.0] * 6) == []
    assert lines(caplog, clock, [10_000.0]) == []


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3_599, "59:59"), (3_725, "1:02:05")])
def test_durations(seconds: float, shown: str):
    assert duration(seconds) == shown


def test_on_a_terminal_there_is_a_bar():
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    code = "from gist_ray.counted import counted; list(counted(range(3), 3, 'guide vectors', 'block'))"
    subprocess.run([sys.executable, "-c", code], stderr=terminal, check=True, timeout=60)
    os.close(terminal)
    shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "guide vectors: 100%" in shown and "3/3" in shown
