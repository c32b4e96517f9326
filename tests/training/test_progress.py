"""Progress: a bar on a real terminal, lines of the log elsewhere."""

import fcntl
import json
import logging
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gist_ray.metrics import METRICS, MetricsLog
from gist_ray.training.progress import progress


def write(folder: Path, *steps: int) -> None:
    with (folder / METRICS).open("a") as stream:
        for step in steps:
            line = {"step": step, "loss": 1.25, "masked_share": 0.031, "tokens_per_s": 3000.4, "eta_s": 3725.0}
            stream.write(json.dumps(line) + "\n")


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """stderr as a terminal; what is shown on it is in the list afterwards."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    shown: list[str] = []
    with os.fdopen(slave, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield shown
        monkeypatch.undo()
        os.set_blocking(master, False)
        pieces = []
        while True:
            try:
                pieces.append(os.read(master, 65536))
            except BlockingIOError:
                break
        shown += re.split(r"[\r\n]+", b"".join(pieces).decode())
    os.close(master)


def test_a_terminal_gets_a_bar_that_goes_back_at_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    with terminal(monkeypatch) as shown, progress(tmp_path / METRICS, 40):
        write(tmp_path, *range(1, 31))
        time.sleep(0.8)
        MetricsLog(tmp_path, 20).close()
        time.sleep(0.8)
        write(tmp_path, 21)
    lines = [line for line in shown if line.strip("\x1b[A ")]
    assert "0/40" in lines[0]
    bars = [match.group() for line in lines if (match := re.search(r"\d+/40", line))]
    assert [bar for i, bar in enumerate(bars) if bar not in bars[i - 1 : i]] == ["0/40", "30/40", "20/40", "21/40"]
    assert sum("train: restarted at step 20; 10 steps are done again" in line for line in lines) == 1
    last = lines[-1]
    assert re.search(r"52%|53%", last) and "loss 1.250, masked 3.1%, 3,000 tokens/s, 1:02:05 left" in last
    assert not caplog.records


def test_elsewhere_the_first_and_the_last_step_are_logged_and_few_between(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "gist_ray")
    with progress(tmp_path / METRICS, 400):
        write(tmp_path, 1)
        time.sleep(0.8)
        write(tmp_path, 2, 3)
        time.sleep(0.8)
        write(tmp_path, 4)
    assert [record.getMessage() for record in caplog.records] == [
        f"train: step {step} of 400, loss 1.250, masked 3.1%, 3,000 tokens/s, 1:02:05 left" for step in (1, 4)
    ]


def test_lines_of_the_log_come_at_their_rate_and_restarts_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "gist_ray")
    with progress(tmp_path / METRICS, 400, every_s=0.1):
        for step in (7, 8):
            write(tmp_path, step)
            time.sleep(0.7)
        MetricsLog(tmp_path, 0).close()
        time.sleep(0.7)
        write(tmp_path, 1)
    said = [record.getMessage().split(",")[0] for record in caplog.records]
    assert said == [
        "train: step 7 of 400",
        "train: step 8 of 400",
        "train: restarted at step 0; 8 steps are done again",
        "train: step 1 of 400",
    ]


@pytest.mark.parametrize("line", [{"step": 5}, {"step": 5, "loss": None, "eta_s": float("inf")}])
def test_a_line_with_nothing_but_its_step_is_enough(tmp_path: Path, line: dict, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "gist_ray")
    with progress(tmp_path / METRICS, 5):
        (tmp_path / METRICS).write_text(json.dumps(line) + "\n")
    assert [record.getMessage() for record in caplog.records] == ["train: step 5 of 5"]


def test_nothing_is_said_of_a_run_that_never_stepped_and_errors_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "gist_ray")
    with pytest.raises(RuntimeError, match="training failed"), progress(tmp_path / "away" / METRICS, 5):
        raise RuntimeError("training failed")
    assert not caplog.records


def test_storage_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "gist_ray")
    (tmp_path / METRICS).mkdir()  # opening it is an OSError that is not "not found"
    with progress(tmp_path / METRICS, 5):
        time.sleep(0.7)
        (tmp_path / METRICS).rmdir()
        write(tmp_path, 2)
    assert caplog.messages[0].startswith("train: step 2 of 5")
