"""Metrics: what a run writes down, what a restart takes back, and who else is told."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from gist_ray.metrics import (
    EVENTS,
    METRICS,
    TENSORBOARD,
    VALIDATIONS,
    MetricsLog,
    Tail,
    add_validation,
    read_metrics,
    remove_logs,
    scalars,
)

STEP = {
    "step": 12,
    "total_steps": 400,
    "clock_s": 1.7e9,
    "rows_crc32": 12345,
    "loss": 1.25,
    "grad_norm": None,
    "workers": 2,
    "phases": {"forward": [0.5, 0.7], "gather": [0.2, 0.0], "checkpoint": []},
}


def steps(file: Path) -> list[int]:
    return [line["step"] for line in read_metrics(file)]


def written(folder: Path, upto: int, start: int = 0) -> None:
    log = MetricsLog(folder, start)
    for step in range(start + 1, upto + 1):
        log.write({"step": step, "loss": 10.0 * start + step, "phases": {"forward": [0.1234567891, 1 / 3]}})
    log.close()


def curve(folder: Path, tag: str, run: str = "") -> list[tuple[int, float]]:
    """A curve as TensorBoard would show it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / TENSORBOARD / run))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


class Recorder:
    def __init__(self, fail_at: int | None = None) -> None:
        self.lines: list[Any] = []
        self.closed = 0
        self.fail_at = fail_at

    def log(self, line: dict[str, Any]) -> None:
        if line["step"] == self.fail_at:
            raise ConnectionError("gone")
        self.lines.append(line)

    def close(self) -> None:
        self.closed += 1


def test_metrics_after_the_checkpoint_are_taken_back(tmp_path: Path):
    written(tmp_path, 3)
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 4, "lo')  # a kill in mid-write
    assert steps(tmp_path / METRICS) == [1, 2, 3]
    MetricsLog(tmp_path, 2).close()
    assert steps(tmp_path / METRICS) == [1, 2]
    MetricsLog(tmp_path, 0).close()
    assert steps(tmp_path / METRICS) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == [EVENTS, METRICS, TENSORBOARD]


def test_events_are_never_taken_back_and_tell_what_was(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    log.write_event({"step": 0, "event": "start", "workers": 2})
    for step in (1, 2, 3):
        log.write({"step": step})
    log.write_event({"step": 2, "event": "checkpoint", "stall_s": 0.5})
    log.close()
    with (tmp_path / EVENTS).open("a") as stream:
        stream.write('{"step": 3, "ev')  # a kill in mid-write
    again = MetricsLog(tmp_path, 2)
    again.write_event({"step": 2, "event": "start", "workers": 1})
    again.close()
    MetricsLog(tmp_path, 2).close()  # nothing to take back: no event
    events = read_metrics(tmp_path / EVENTS)
    assert [(event["step"], event["event"]) for event in events] == [
        (0, "start"),
        (2, "checkpoint"),
        (2, "taken_back"),
        (2, "start"),
    ]
    assert events[2]["steps"] == 1
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


@pytest.mark.parametrize("checkpoint", [0, 2])
def test_tensorboard_shows_one_curve_over_a_restart(tmp_path: Path, checkpoint: int):
    written(tmp_path, 4)
    written(tmp_path, 5, start=checkpoint)
    expected = [(step, float(step)) for step in range(1, checkpoint + 1)]
    expected += [(step, 10.0 * checkpoint + step) for step in range(checkpoint + 1, 6)]
    assert curve(tmp_path, "loss") == expected
    assert [step for step, _ in curve(tmp_path, "phase/forward/max")] == [1, 2, 3, 4, 5]
    assert curve(tmp_path, "phase/forward/max")[0][1] == pytest.approx(1 / 3, abs=1e-6)


def test_tensorboard_has_events_and_no_counters_of_steps(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    log.write(STEP)
    log.write_event({"step": 12, "event": "checkpoint", "stall_s": 0.5})
    log.close()
    assert curve(tmp_path, "checkpoint/stall_s") == [(12, 0.5)]
    with pytest.raises(KeyError):
        curve(tmp_path, "total_steps")


def test_validations_of_another_process_are_told_on_once(tmp_path: Path):
    first, again = Recorder(), Recorder()
    log = MetricsLog(tmp_path, 0, [first])
    log.write({"step": 2, "loss": 1.0})
    add_validation(tmp_path, 2, {"score": 0.25})
    log.write({"step": 3, "loss": 1.0})
    add_validation(tmp_path, 4, {"score": 0.5})
    log.close()
    log = MetricsLog(tmp_path, 4, [again])
    add_validation(tmp_path, 6, {"score": 0.75})
    log.close()
    add_validation(tmp_path, 8, {"score": 0.875})  # the last checkpoint is scored when the log has ended
    assert [line.get("score") for line in first.lines] == [None, None, 0.25, 0.5]
    assert [line["score"] for line in again.lines] == [0.75]
    expected = [(2, 0.25), (4, 0.5), (6, 0.75), (8, 0.875)]
    assert curve(tmp_path, "validation/score", "validation") == expected
    assert [(line["step"], line["score"]) for line in read_metrics(tmp_path / VALIDATIONS)] == expected


def test_a_line_keeps_what_was_written_but_nanoseconds(tmp_path: Path):
    written(tmp_path, 1)
    (line,) = read_metrics(tmp_path / METRICS)
    assert line == {"step": 1, "loss": 1.0, "phases": {"forward": [0.123457, 0.333333]}}


def test_numbers_of_a_line_have_flat_names():
    assert scalars(STEP) == {
        "loss": 1.25,
        "workers": 2.0,
        "phase/forward/mean": pytest.approx(0.6),
        "phase/forward/max": 0.7,
        "phase/gather/mean": 0.1,
        "phase/gather/max": 0.2,
    }
    event = {"time": 1.0, "step": 200, "event": "validation", "score": 0.93, "text": "no number"}
    assert scalars(event) == {"validation/score": 0.93}


def test_a_sink_that_fails_is_warned_of_once_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    bad, good = Recorder(fail_at=2), Recorder()
    log = MetricsLog(tmp_path, 0, [bad, good])
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            log.write({"step": step})
        log.write_event({"step": 3, "event": "checkpoint"})
        log.close()
    assert [line["step"] for line in bad.lines] == [1] and not bad.closed
    assert [line["step"] for line in good.lines] == [1, 2, 3, 3] and good.closed == 1
    assert good.lines[-1]["event"] == "checkpoint"
    assert len(caplog.records) == 1 and "gone" in caplog.text
    assert steps(tmp_path / METRICS) == [1, 2, 3]


def test_a_new_run_starts_without_the_logs_of_the_old_one(tmp_path: Path):
    written(tmp_path, 2)
    (tmp_path / "tracker-mlflow.json").write_text("{}")
    (tmp_path / VALIDATIONS).write_text("{}")
    (tmp_path / "shards").mkdir()
    remove_logs(tmp_path)
    remove_logs(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["shards"]


def test_tail_gives_each_line_once_and_waits_for_its_end(tmp_path: Path):
    file = tmp_path / METRICS
    tail = Tail(file)
    assert list(tail.new_lines()) == []
    with file.open("a") as stream:
        stream.write('{"step": 1}\n{"step": ')
        stream.flush()
        assert list(tail.new_lines()) == [{"step": 1}]
        stream.write('2}\n{"cut\n')
        stream.flush()
        assert list(tail.new_lines()) == [{"step": 2}]
    assert list(tail.new_lines()) == [] and tail.replaced == 0


def test_tail_that_is_not_read_to_the_end_goes_on_where_it_was_left(tmp_path: Path):
    (tmp_path / METRICS).write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)))
    tail = Tail(tmp_path / METRICS)
    assert next(tail.new_lines())["step"] == 0
    assert [line["step"] for line in tail.new_lines()] == [1, 2, 3, 4]


def test_tail_reads_a_file_anew_that_a_restart_replaced(tmp_path: Path):
    written(tmp_path, 4)
    tail = Tail(tmp_path / METRICS)
    assert len(list(tail.new_lines())) == 4
    written(tmp_path, 4, start=4)  # as long as before, and another file all the same
    assert [line["step"] for line in tail.new_lines()] == [1, 2, 3, 4] and tail.replaced == 1
    written(tmp_path, 3, start=2)
    assert [line["step"] for line in tail.new_lines()] == [1, 2, 3] and tail.replaced == 2
