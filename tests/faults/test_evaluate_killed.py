"""Kill -9 of an encoder actor, of a scoring task and of the driver in mid-evaluation: the scores stay what they are."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.processes import descendants, wait_until_ended
from tests.faults.verse_tasks import VERSE_TASKS, write_verse_tasks

pytestmark = pytest.mark.slow

VERSES = 20_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gist_ray.tour import read_verses

    return write_verse_tasks(tmp_path_factory.mktemp("data"), read_verses()[:VERSES])


def start(model: Path, data: Path, out: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gist_ray.cli", "evaluate", str(model), "--data", str(data), "--out", str(out)]
    environment = os.environ | {"GIST_RAY_CACHE": str(cache)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str], out: Path) -> dict[str, float]:
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert printed == f"{out}\n"
    tasks = json.loads((out / "report.json").read_text())["tasks"]
    return {task["name"]: task["score"] for task in tasks}


def results(out: Path) -> dict[str, int]:
    """Stored results, and which file each is."""
    return {file.stem: file.stat().st_ino for file in out.glob("results/*/*/*.json") if file.stem in VERSE_TASKS}


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return finish(start(tiny_model, data, folder / "out", folder / "cache"), folder / "out")


@pytest.mark.parametrize("victim", ["ray::EncoderActor.", "ray::scored"])
def test_a_killed_process_is_made_up_for(tiny_model: Path, data: Path, tmp_path: Path, undisturbed, victim: str):
    process = start(tiny_model, data, tmp_path / "out", tmp_path / "cache")
    deadline, pid = time.monotonic() + 120, None
    while pid is None and process.poll() is None and time.monotonic() < deadline:
        pid = next((pid for pid, name in descendants(process.pid).items() if name.startswith(victim)), None)
        time.sleep(0.02)
    assert pid is not None and len(results(tmp_path / "out")) < len(VERSE_TASKS), (
        "the kill came too late to show anything"
    )
    os.kill(pid, signal.SIGKILL)
    assert finish(process, tmp_path / "out") == undisturbed


def test_a_killed_driver_leaves_what_was_scored(tiny_model: Path, data: Path, tmp_path: Path, undisturbed):
    out = tmp_path / "out"
    process = start(tiny_model, data, out, tmp_path / "cache")
    deadline = time.monotonic() + 120
    while not results(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    below = descendants(process.pid)
    process.kill()
    process.communicate()
    ours = ("ray::EncoderActor", "ray::scored")
    wait_until_ended([pid for pid, name in below.items() if name.startswith(ours)])
    kept = results(out)
    assert 1 <= len(kept) < len(VERSE_TASKS), "the kill came too late to show anything"
    assert finish(start(tiny_model, data, out, tmp_path / "cache"), out) == undisturbed
    assert {name: results(out)[name] for name in kept} == kept  # none was scored again
