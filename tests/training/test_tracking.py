"""Tracking: the run's log reaches its trackers once, whatever dies in between, and never stops training."""

import json
import logging
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gist_ray.config import Recipe
from gist_ray.errors import InputError
from gist_ray.metrics import EVENTS, METRICS, VALIDATIONS, MetricsLog, remove_logs
from gist_ray.recipe_file import parse_recipe
from gist_ray.training import tracking
from gist_ray.training.tracking import check_trackers, tracked


def recipe_for(**trackers: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "run",
            "data": {"sources": [{"path": "a.jsonl"}]},
            "student": {"path": "student"},
            "guide": {"path": "guide"},
            "tracking": trackers,
        }
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "_SEND_EVERY_S", 0.05)
    monkeypatch.setattr(tracking, "_RETRY_EVERY_S", 0.1)
    for name, value in {
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "WANDB_ERROR_REPORTING": "false",
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture
def on_disk(tmp_path: Path) -> Recipe:
    return recipe_for(mlflow={"tracking_uri": str(tmp_path / "mlruns")})


def runs_of(recipe: Recipe) -> list[Any]:
    from mlflow import MlflowClient

    assert recipe.tracking.mlflow
    client = MlflowClient(recipe.tracking.mlflow.tracking_uri)
    experiment = client.get_experiment_by_name(recipe.tracking.mlflow.experiment)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def curve_of(recipe: Recipe, run: str, name: str = "loss") -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    assert recipe.tracking.mlflow
    history = MlflowClient(recipe.tracking.mlflow.tracking_uri).get_metric_history(run, name)
    return [(point.step, point.value) for point in history]


def write(run_dir: Path, start: int, stop: int, value: float = 1.0) -> None:
    """What a worker writes that starts after step `start` and dies after step `stop`."""
    log = MetricsLog(run_dir, start)
    log.write_event({"step": start, "event": "start", "workers": 2})
    for step in range(start + 1, stop + 1):
        log.write({"step": step, "loss": value})
    log.close()


class MlflowServer:
    """As much of MLflow's REST interface as a run needs, in memory: https://mlflow.org/docs/latest/rest-api.html."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.runs: list[str] = []
        self.failing = self.hanging = False
        self.address = "http://127.0.0.1:0"
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        state = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: dict[str, Any]) -> None:
                status, reply = state.reply(urllib.parse.urlsplit(self.path).path.split("/mlflow/")[1], body)
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        port = urllib.parse.urlsplit(self.address).port or 0
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def reply(self, call: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        while self.hanging:
            time.sleep(0.05)
        if self.failing:
            return 400, {"error_code": "BAD_REQUEST", "message": "the disk of the server is full"}
        if call == "experiments/get-by-name":
            return 200, {"experiment": {"experiment_id": "7", "name": "gist-ray", "lifecycle_stage": "active"}}
        if call == "runs/create":
            self.runs.append(f"run{len(self.runs)}")
        if call == "runs/log-batch":
            self.steps += [metric["step"] for metric in body.get("metrics", []) if metric["key"] == "loss"]
        info = {"run_id": self.runs[-1] if self.runs else "", "experiment_id": "7", "lifecycle_stage": "active"}
        return 200, {"run": {"info": info, "data": {}}, "run_info": info}


@pytest.fixture
def server() -> Iterator[MlflowServer]:
    server = MlflowServer()
    server.start()
    yield server
    server.hanging = False
    server.stop()


def until(condition: Any, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_steps_and_events_reach_the_tracker_while_training_runs(on_disk: Recipe, tmp_path: Path):
    run_dir = tmp_path / "run"
    with tracked(on_disk, run_dir):
        until(lambda: runs_of(on_disk))
        log = MetricsLog(run_dir, 0)
        for step in range(1, 451):  # more than are sent at once
            log.write({"step": step, "total_steps": 450, "loss": 1 / step, "phases": {"forward": [0.5, 0.7]}})
        log.write_event({"step": 450, "event": "validation", "score": 0.93})
        (run,) = runs_of(on_disk)
        until(lambda: "validation/score" in runs_of(on_disk)[0].data.metrics)
        assert run.info.status == "RUNNING"
        log.close()
    (run,) = runs_of(on_disk)
    assert run.info.status == "FINISHED" and run.data.metrics["phase/forward/max"] == 0.7
    assert "total_steps" not in run.data.metrics
    assert curve_of(on_disk, run.info.run_id) == [(step, 1 / step) for step in range(1, 451)]
    assert curve_of(on_disk, run.info.run_id, "validation/score") == [(450, 0.93)]


def test_restarts_of_workers_and_of_the_driver_continue_one_curve(on_disk: Recipe, tmp_path: Path):
    with pytest.raises(RuntimeError, match="driver dies"), tracked(on_disk, tmp_path):
        write(tmp_path, 0, 6, value=1.0)
        until(lambda: runs_of(on_disk) and runs_of(on_disk)[0].data.metrics.get("loss"))
        until(lambda: len(curve_of(on_disk, runs_of(on_disk)[0].info.run_id)) == 6)
        write(tmp_path, 4, 8, value=2.0)  # a worker died: steps 5 and 6 are done again
        raise RuntimeError("driver dies")
    (run,) = runs_of(on_disk)
    assert run.info.status == "FAILED"
    with tracked(on_disk, tmp_path):
        write(tmp_path, 6, 10, value=3.0)
    (run,) = runs_of(on_disk)
    assert run.info.status == "FINISHED"
    assert curve_of(on_disk, run.info.run_id) == [(s, 1.0) for s in range(1, 7)] + [
        (7, 2.0),
        (8, 2.0),
        (9, 3.0),
        (10, 3.0),
    ]
    assert curve_of(on_disk, run.info.run_id, "start/workers") == [(0, 2), (4, 2), (6, 2)]
    assert curve_of(on_disk, run.info.run_id, "taken_back/steps") == [(4, 2), (6, 2)]


def test_a_new_run_and_another_place_start_anew(on_disk: Recipe, tmp_path: Path):
    for _ in range(2):
        remove_logs(tmp_path)
        with tracked(on_disk, tmp_path):
            write(tmp_path, 0, 2)
    assert len(runs_of(on_disk)) == 2
    elsewhere = recipe_for(mlflow={"tracking_uri": str(tmp_path / "mlruns"), "experiment": "other"})
    with tracked(elsewhere, tmp_path):
        pass
    (run,) = runs_of(elsewhere)
    assert [step for step, _ in curve_of(elsewhere, run.info.run_id)] == [1, 2]  # it gets what was before, too
    (tmp_path / "tracker-mlflow.json").write_text('{"cut')
    with tracked(elsewhere, tmp_path):
        pass
    assert len(runs_of(elsewhere)) == 2


def test_a_server_that_goes_and_comes_back_gets_what_it_missed(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    recipe = recipe_for(mlflow={"tracking_uri": server.address})
    with caplog.at_level(logging.WARNING), tracked(recipe, tmp_path):
        write(tmp_path, 0, 3)
        until(lambda: server.steps == [1, 2, 3])
        server.stop()
        write(tmp_path, 3, 5)
        until(lambda: caplog.records)
        time.sleep(0.5)  # several tries
        server.start()
        until(lambda: server.steps == [1, 2, 3, 4, 5])
        server.failing = True
        write(tmp_path, 5, 6)
        time.sleep(0.5)
        server.failing = False
    assert server.steps == [1, 2, 3, 4, 5, 6] and server.runs == ["run0"]
    ours = [record for record in caplog.records if record.name.startswith("gist_ray")]
    assert len(ours) == 1 and "training goes on" in ours[0].getMessage()


def test_a_server_that_is_gone_from_the_start_or_hangs_does_not_stop_training(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "_LAST_SEND_S", 1.0)
    server.stop()
    gone = recipe_for(mlflow={"tracking_uri": server.address})
    started = time.monotonic()
    with tracked(gone, tmp_path):
        write(tmp_path, 0, 3)
    server.hanging = True
    server.start()
    with tracked(gone, tmp_path):
        time.sleep(0.3)
    assert time.monotonic() - started < 10
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("gist_ray")]
    assert len(ours) == 2 and "training goes on" in ours[0] and "in time" in ours[1] and METRICS in ours[1]


def test_a_tracker_that_hangs_does_not_hold_up_another(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "_LAST_SEND_S", 15.0)
    server.hanging = True
    recipe = recipe_for(mlflow={"tracking_uri": server.address}, wandb={"mode": "offline"})
    with tracked(recipe, tmp_path):
        write(tmp_path, 0, 3)
        state = tmp_path / "tracker-wandb.json"
        until(lambda: state.is_file() and json.loads(state.read_text())["step"] == 3)
        server.hanging = False
    assert server.steps == [1, 2, 3]


def test_an_event_that_was_sent_is_not_sent_again(on_disk: Recipe, tmp_path: Path):
    for score in (0.5, 0.75):
        with tracked(on_disk, tmp_path):
            for name, event in ((EVENTS, "checkpoint"), (VALIDATIONS, "validation")):
                with (tmp_path / name).open("a") as stream:
                    stream.write(json.dumps({"step": 9, "event": event, "score": score}) + "\n")
    (run,) = runs_of(on_disk)
    for name in ("checkpoint/score", "validation/score"):
        assert curve_of(on_disk, run.info.run_id, name) == [(9, 0.5), (9, 0.75)]


def test_no_tracker_no_thread_no_file(tmp_path: Path):
    before = threading.active_count()
    with tracked(recipe_for(), tmp_path):
        assert threading.active_count() == before
    check_trackers(recipe_for())
    assert not list(tmp_path.iterdir())


def test_good_trackers_pass_the_check(server: MlflowServer, on_disk: Recipe):
    check_trackers(recipe_for(mlflow={"tracking_uri": server.address}, wandb={"mode": "offline"}))
    check_trackers(on_disk)


@pytest.mark.parametrize(
    "trackers,message",
    [
        ({"mlflow": {}}, r"MLflow at http://\*\*\*@127.0.0.1:9"),  # from the environment, where passwords belong
        ({"mlflow": {"tracking_uri": "nonsense://host"}}, "tracking.mlflow: cannot log to MLflow at nonsense://host"),
        ({"wandb": {"project": "verses"}}, "tracking.wandb: cannot log to Weights & Biases, project verses: .*key"),
    ],
)
def test_a_wrong_tracker_is_told_before_training(
    trackers: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as told:
        check_trackers(recipe_for(**trackers))
    assert "secret" not in str(told.value) and "remove that section" in str(told.value)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("name,package", [("mlflow", "mlflow-skinny"), ("wandb", "wandb")])
def test_a_missing_package_is_told_with_its_command(name: str, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"tracking.{name} needs a package .*`pip install {package}`"):
        check_trackers(recipe_for(**{name: {}}))
