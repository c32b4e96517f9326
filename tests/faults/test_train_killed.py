"""Kill -9 of a worker, a driver, a raylet; a full disk; a truncated checkpoint: each ends in an exact resume."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gist_ray.metrics import read_metrics
from gist_ray.training.checkpoint import progress_of
from tests.faults.processes import descendants, wait_until_ended

pytestmark = pytest.mark.slow

KILL_AFTER_STEP = 23  # past the checkpoint of step 20, so that steps must be repeated
STEPS = {"batch_size": 8, "epochs": 2, "checkpoint_steps": 10, "learning_rate": 1e-3}


def write_recipe(folder: Path, model: Path, rows: list[dict[str, Any]], name: str, **train: Any) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:400]))
    recipe = {
        "name": name,
        "output_dir": str(folder),
        "data": {"sources": [{"path": str(folder / "a.jsonl")}]},
        "student": {"path": str(model), "max_tokens": 32},
        "guide": {"path": str(model)},
        "train": {**STEPS, **train},
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
    wait_for_step(metrics, 1, process)
    workers = workers_of(process)
    assert len(workers) == 2
    wait_for_step(metrics, KILL_AFTER_STEP, process)
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


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The training workers of a driver; listing them takes as long as some steps of theirs, so do it before a kill."""
    return [pid for pid, name in descendants(process.pid).items() if name.startswith("ray::RayTrainWorker")]


def kill_driver_at(step: int, metrics: Path, process: subprocess.Popen[str]) -> None:
    """Kill -9 the driver past `step`, and wait until its workers are gone: they would write beside the resumed run.

    They go on for some steps, till they see that it is gone: the last checkpoint may be one of theirs.
    """
    wait_for_step(metrics, step - 10, process)  # of this run: an earlier one may have left steps in the log
    workers = workers_of(process)
    assert workers
    wait_for_step(metrics, step, process)
    process.kill()
    process.communicate()
    wait_until_ended(workers)


def finish(recipe: Path, *options: str) -> str:
    """Run to the end and return what stderr said."""
    process = start(recipe, *options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out.strip() == str(recipe.parent / recipe.stem / "checkpoint")
    return err


def checkpoints(recipe: Path) -> list[Path]:
    """Folders of the run's checkpoints, oldest first."""
    return sorted((recipe.parent / recipe.stem).glob("train-*/step-*"))


def test_a_killed_driver_is_resumed_from_the_last_whole_checkpoint(
    undisturbed, tiny_model: Path, verse_rows, tmp_path: Path
):
    recipe = write_recipe(tmp_path, tiny_model, verse_rows, "run")
    process = start(recipe)
    metrics = tmp_path / "run" / "metrics.jsonl"
    kill_driver_at(KILL_AFTER_STEP, metrics, process)

    refused = start(recipe)
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "--resume" in err and "Traceback" not in err

    # The newest checkpoint is cut short, as by a machine that lost its power: the one before is taken.
    whole = [folder for folder in checkpoints(recipe) if progress_of(str(folder))]
    steps = [int(folder.name.split("-")[1]) for folder in whole]
    assert len(steps) in (2, 3)  # two are kept, and the oldest goes after the newest is whole
    assert steps == list(range(steps[0], steps[-1] + 1, 10))
    assert 20 <= steps[-1] < len(undisturbed)  # the last one before the kill or since, and there was work left
    state = max(whole[-1].glob("state-*"))
    state.write_bytes(state.read_bytes()[:-100])
    finish(recipe, "--resume")
    assert losses(metrics) == undisturbed
    starts = [e["step"] for e in read_metrics(tmp_path / "run" / "events.jsonl") if e["event"] == "start"]
    assert starts == [0, steps[-2]]


def test_a_killed_raylet_ends_the_run_and_it_can_be_resumed(undisturbed, tiny_model: Path, verse_rows, tmp_path: Path):
    """The only node's raylet is the cluster: the driver must say so and end, not hang."""
    recipe = write_recipe(tmp_path, tiny_model, verse_rows, "run")
    process = start(recipe)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for_step(metrics, KILL_AFTER_STEP, process)
    below = descendants(process.pid)
    (raylet,) = [pid for pid, name in below.items() if "/raylet/raylet" in name.split(" ")[0]]
    os.kill(raylet, signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1 and "--resume" in err, err[-3000:]
    finish(recipe, "--resume")
    assert losses(metrics) == undisturbed


def test_two_one_two_workers_see_the_same_rows_in_the_same_order(tiny_model: Path, verse_rows, tmp_path: Path):
    """Without dropout, which depends on the worker, the losses agree too."""
    straight = write_recipe(tmp_path, tiny_model, verse_rows, "straight", dropout=0.0, epochs=3)
    finish(straight)
    recipe = write_recipe(tmp_path, tiny_model, verse_rows, "changing", dropout=0.0, epochs=3)
    metrics = tmp_path / "changing" / "metrics.jsonl"
    for workers, step in ((2, 23), (1, 73)):
        options = ["--resume"] if workers == 1 else []
        process = start(recipe, *options, "--set", f"cluster.num_workers={workers}")
        kill_driver_at(step, metrics, process)
    finish(recipe, "--resume")
    expected = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    found = read_metrics(metrics)
    workers = [line["workers"] for line in found]
    first, second = workers.index(1), len(workers) - workers[::-1].index(1)
    assert workers == [2] * first + [1] * (second - first) + [2] * (len(workers) - second)
    assert 10 <= first < second <= len(workers) - 10  # each leg made steps that stayed
    assert [line["rows_crc32"] for line in found] == [line["rows_crc32"] for line in expected]
    assert len({line["rows_crc32"] for line in found}) > 0.9 * len(found)
    np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in expected], rtol=2e-3)


FULL_DISK = """
set -u
mount -t tmpfs -o size={small}k tmpfs {disk}
{python} -m gist_ray.cli train {recipe} --set cluster.max_failures=0; echo $? > {folder}/first-code
ls {disk}/*/ > {folder}/first-files
mount -o remount,size=1g {disk}
{python} -m gist_ray.cli train {recipe} --resume; echo $? > {folder}/second-code
"""


def test_a_full_disk_keeps_the_checkpoint_before(undisturbed, tiny_model: Path, verse_rows, tmp_path: Path):
    """A disk with room for one checkpoint and a half; then with room for more."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    recipe = write_recipe(tmp_path, tiny_model, verse_rows, "run", storage_path=str(disk))
    checkpoint_kb = 3 * sum(file.stat().st_size for file in tiny_model.glob("*.safetensors")) // 1024
    script = FULL_DISK.format(
        small=checkpoint_kb * 3 // 2, disk=disk, folder=tmp_path, recipe=recipe, python=sys.executable
    )
    ran = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (tmp_path / "first-code").read_text().strip() == "1", ran.stderr[-3000:]
    assert "No space left on device" in ran.stderr and "the one before is whole" in ran.stderr
    assert "step-00000010" in (tmp_path / "first-files").read_text()
    assert (tmp_path / "second-code").read_text().strip() == "0", ran.stderr[-3000:]
    assert losses(tmp_path / "run" / "metrics.jsonl") == undisturbed
    starts = [e["step"] for e in read_metrics(tmp_path / "run" / "events.jsonl") if e["event"] == "start"]
    assert starts == [0, 10]
