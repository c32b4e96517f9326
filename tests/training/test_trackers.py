"""Trackers: real MLflow on a file store and over HTTP, real W&B without a network."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gist_ray.config import Recipe
from gist_ray.errors import InputError
from gist_ray.recipe_file import parse_recipe
from gist_ray.training.trackers import flat_params, trackers_of


def recipe_for(tracking: dict[str, Any], **sections: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "run",
        "data": {"sources": [{"path": "a.jsonl"}]},
        "student": {"path": "student"},
        "guide": {"path": "guide"},
        "tracking": tracking,
    }
    return parse_recipe({**tree, **sections})


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))  # of whoever runs the tests: no netrc, no settings


@pytest.fixture
def mlflow_recipe(tmp_path: Path) -> Recipe:
    return recipe_for({"mlflow": {"tracking_uri": str(tmp_path / "mlruns"), "experiment": "verses"}})


def mlflow_client(recipe: Recipe) -> Any:
    from mlflow import MlflowClient

    assert recipe.tracking.mlflow
    return MlflowClient(recipe.tracking.mlflow.tracking_uri)


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a W&B file: a LevelDB log, https://github.com/google/leveldb/blob/main/doc/log_format.md."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def wait_until_written(run_dir: Path) -> None:
    """W&B's own process may still write when a run is closed; the last record of a file is `exit`."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        kinds = [[record.WhichOneof("record_type") for record in wandb_records(file)] for file in wandb_files(run_dir)]
        if all("exit" in found for found in kinds):
            return
        time.sleep(0.1)


def wandb_history(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """W&B run id to what was logged, without W&B's own keys."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in wandb_files(run_dir):
        rows = found.setdefault(file.stem.removeprefix("run-"), [])
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return found


def test_mlflow_takes_a_run_and_its_recipe(mlflow_recipe: Recipe, tmp_path: Path):
    (tracker,) = trackers_of(mlflow_recipe)
    tracker.check()
    client = mlflow_client(mlflow_recipe)
    assert client.get_experiment_by_name("verses") is None  # a check leaves nothing behind
    run = tracker.open(None, tmp_path)
    tracker.send([(step, {"loss": 1 / step, "phase/forward/max": float("nan")}) for step in range(1, 701)])
    assert client.get_run(run).info.status == "RUNNING"
    tracker.close(succeeded=True)
    found = client.get_run(run)
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert client.get_experiment(found.info.experiment_id).name == "verses"
    assert found.data.params == flat_params(mlflow_recipe)
    history = client.get_metric_history(run, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 701)]
    assert len(client.get_metric_history(run, "phase/forward/max")) == 700


def test_mlflow_continues_a_run_and_keeps_its_parameters(mlflow_recipe: Recipe, tmp_path: Path):
    (tracker,) = trackers_of(mlflow_recipe)
    run = tracker.open(None, tmp_path)
    tracker.send([(1, {"loss": 1.0})])
    tracker.close(succeeded=False)
    client = mlflow_client(mlflow_recipe)
    assert client.get_run(run).info.status == "FAILED"
    changed = mlflow_recipe.model_copy(update={"cluster": mlflow_recipe.cluster.model_copy(update={"num_workers": 8})})
    (again,) = trackers_of(changed)
    assert again.open(run, tmp_path) == run
    again.send([(2, {"loss": 0.5})])
    found = client.get_run(run)
    assert found.info.status == "RUNNING" and found.data.params["cluster.num_workers"] == "1"
    assert [point.step for point in client.get_metric_history(run, "loss")] == [1, 2]


def test_mlflow_starts_a_new_run_where_the_old_one_is_gone(mlflow_recipe: Recipe, tmp_path: Path):
    (tracker,) = trackers_of(mlflow_recipe)
    assert tracker.open("0" * 32, tmp_path) != "0" * 32
    (other,) = trackers_of(mlflow_recipe)
    run = other.open(None, tmp_path)
    mlflow_client(mlflow_recipe).delete_run(run)
    assert other.open(run, tmp_path) != run


def test_any_recipe_fits_the_limits_of_mlflow(tmp_path: Path):
    deep: dict[str, Any] = {"zero optimization!": {"a" * 300: "x", "note": ""}, **{f"k{i}": i for i in range(150)}}
    recipe = recipe_for(
        {"mlflow": {"tracking_uri": str(tmp_path / "mlruns")}},
        data={"sources": [{"path": f"{'long' * 50}-{i}.jsonl"} for i in range(100)]},
        train={"deepspeed": deep},
    )
    params = flat_params(recipe)
    assert len(params["data.sources"]) == 6000 and params["data.sources"].startswith('[{"path": "longlong')
    assert params["train.batch_size"] == "128" and params["train.schedule"] == "linear"
    assert params["student.prompt"] == '""' and params["guide.max_tokens"] == "null"
    assert params["train.deepspeed.zero optimization_.note"] == '""'
    assert not [name for name in params if name.startswith("tracking")]
    (tracker,) = trackers_of(recipe)
    run = tracker.open(None, tmp_path)
    assert mlflow_client(recipe).get_run(run).data.params == params


@pytest.mark.parametrize(
    "task,name",
    [("a, b & c", "a_ b _ c"), ("../up", "_/up"), ("/", "_/_"), ("x" * 300, "x" * 233), ("Größe: 1", "Größe: 1")],
)
def test_mlflow_takes_scores_of_tasks_of_any_name(mlflow_recipe: Recipe, tmp_path: Path, task: str, name: str):
    (tracker,) = trackers_of(mlflow_recipe)
    run = tracker.open(None, tmp_path)
    tracker.send([(1, {f"validation/score/{task}": 0.5})])
    assert mlflow_client(mlflow_recipe).get_run(run).data.metrics == {f"validation/score/{name}": 0.5}


def test_wandb_takes_a_run_and_continues_it(tmp_path: Path):
    recipe = recipe_for({"wandb": {"project": "verses", "mode": "offline"}})
    (tracker,) = trackers_of(recipe)
    tracker.check()
    run = tracker.open(None, tmp_path)
    tracker.send([(1, {"loss": 2.0, "phase/forward/max": 0.5}), (2, {"loss": 1.0})])
    tracker.close(succeeded=False)
    time.sleep(1.1)  # W&B names a run's folder by the second that it starts in
    (again,) = trackers_of(recipe)
    assert again.open(run, tmp_path) == run
    again.send([(3, {"loss": 0.5}), (2, {"validation/score": 0.9})])  # W&B's own step would refuse to go back
    again.close(succeeded=True)
    wait_until_written(tmp_path)
    assert wandb_history(tmp_path) == {
        run: [
            {"step": 1, "loss": 2.0, "phase/forward/max": 0.5},
            {"step": 2, "loss": 1.0},
            {"step": 3, "loss": 0.5},
            {"step": 2, "validation/score": 0.9},
        ]
    }
    files = wandb_files(tmp_path)
    kinds = {record.WhichOneof("record_type"): record for record in wandb_records(files[0])}
    assert kinds["run"].run.project == "verses" and kinds["run"].run.display_name == "run"
    config = {item.key: json.loads(item.value_json) for item in kinds["run"].run.config.update}
    assert config["train"]["batch_size"] == 128 and "tracking" not in config
    assert kinds["metric"].metric.glob_name == "*" and kinds["metric"].metric.step_metric == "step"
    assert kinds["exit"].exit.exit_code == 1


def test_a_run_that_the_caller_has_open_is_left_alone(tmp_path: Path):
    import wandb

    mine = wandb.init(project="mine", mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    (tracker,) = trackers_of(recipe_for({"wandb": {"mode": "offline"}}))
    run = tracker.open(None, tmp_path)
    tracker.close(succeeded=True)
    assert run != mine.id
    mine.log({"still": 1})
    mine.finish()


def test_the_place_of_a_tracker_has_no_password(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="holds a password") as refused:
        recipe_for({"mlflow": {"tracking_uri": "https://me:secret@host/x"}})
    assert "secret" not in str(refused.value)
    mlflow, wandb = trackers_of(recipe_for({"mlflow": {"tracking_uri": "https://host/x"}, "wandb": {"entity": "us"}}))
    assert mlflow.place() == "MLflow at https://host/x, experiment gist-ray"
    assert wandb.place() == "Weights & Biases, project us/gist-ray"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@other")
    (mlflow,) = trackers_of(recipe_for({"mlflow": {}}))
    assert mlflow.place() == "MLflow at https://***@other, experiment gist-ray"


def test_a_recipe_without_trackers_imports_no_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert trackers_of(recipe_for({})) == []
    assert len(trackers_of(recipe_for({"mlflow": {}, "wandb": {}}))) == 2
