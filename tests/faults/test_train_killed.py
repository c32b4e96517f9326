"""Kill -9 of a training worker and of the driver, in mid-run: each ends in an exact resume."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gist_ray.metrics import read_metrics
from tests.faults.processes import alive, descendants

pytestmark = pytest.mark.slow

KILL_AFTER_STEP = 23  # past the checkpoint of step 20, so that steps must be repeated
STEPS = {"batch_size": 8, "epochs": 2, "checkpoint_steps": 10, "learning_rate": 1e-3}


def write_recipe(folder: Path, model: Path, rows: list[dict[str, Any]], name: str) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:400]))
    recipe = {
        "name": name,
        "output_dir": str(folder),
        "data": {"sources": [{"path": str(folder / "a.jsonl")}]},
        "student": {"path": str(model), "max_tokens": 32},
        "guide": {"path": str(model)},
        "train": STEPS,
        "loss": {"temperature": 0.05},
        "cluster": {"num_workers": 2, "max_failures": 2},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def start(recipe: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gist_ray.cli", "train", str(recipe), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        lines = read_metrics(metrics)
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1][-3000:]}")


def losses(metrics: Path) -> list[tuple[int, float]]:
    return [(int(line["step"]), line["loss"]) for line in read_metrics(metrics)]


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, verse_rows, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(write_recipe(folder, tiny_model, verse_rows, "run"))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    assert out.strip() == str(folder / "run" / "checkpoint")
    return losses(folder / "run" / "metrics.jsonl")


def test_a_killed_worker_is_restarted_from_the_checkpoint(undisturbed, tiny_model: Path, verse_rows, tmp_path: Path):
    process = start(write_recipe(tmp_path, tiny_model, verse_rows, "run"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for_step(metrics, KILL_AFTER_STEP, process)
    workers = [pid for pid, name in descendants(process.pid).items() if name.startswith("ray::RayTrainWorker")]
    assert len(workers) == 2
    # Watch the log shrink to the checkpoint: proof that the run really went back.
    shortest: list[int] = []
    watcher = threading.Thread(target=_watch, args=(metrics, process, shortest), daemon=True)
    os.kill(workers[1], signal.SIGKILL)
    watcher.start()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert min(shortest) in (10, 20)  # the last checkpoint that was whole when the worker died
    assert losses(metrics) == undisturbed  # bit for bit


def _watch(metrics: Path, process: subprocess.Popen[str], shortest: list[int]) -> None:
    while process.poll() is None:
        lines = read_metrics(metrics)
        if lines:
            shortest.append(int(lines[-1]["step"]))
        time.sleep(0.005)


def test_a_killed_driver_is_resumed_on_request(undisturbed, tiny_model: Path, verse_rows, tmp_path: Path):
    recipe = write_recipe(tmp_path, tiny_model, verse_rows, "run")
    process = start(recipe)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for_step(metrics, KILL_AFTER_STEP, process)
    below = descendants(process.pid)
    process.kill()
    process.communicate()
    workers = [pid for pid, name in below.items() if name.startswith("ray::RayTrainWorker")]
    assert len(workers) == 2
    deadline = time.monotonic() + 60  # they must end with their driver, or they would write beside the resumed run
    while alive(workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(workers), "training workers outlived their driver"

    refused = start(recipe)
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "--resume" in err and "Traceback" not in err

    resumed = start(recipe, "--resume")
    out, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err[-3000:]
    assert out.strip() == str(tmp_path / "run" / "checkpoint")
    assert losses(metrics) == undisturbed
