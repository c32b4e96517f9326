"""Kill -9 of the driver and of a guide actor in mid-prepare: the shards end as if nothing had happened, bit for bit."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.faults.processes import descendants, wait_until_ended

pytestmark = pytest.mark.slow

ROWS = 12_000
ACTORS = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verses with numbers before them: enough distinct texts for several blocks."""
    from gist_ray.tour import read_verses

    verses = read_verses()[:ROWS]
    file = tmp_path_factory.mktemp("source") / "rows.jsonl"
    rows = ({"query": v.web, "pos": v.ylt, "neg": verses[i - 1].ylt, "task_name": "v"} for i, v in enumerate(verses))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_recipe(folder: Path, source: Path, model: Path) -> Path:
    recipe = {
        "name": "run",
        "output_dir": str(folder),
        "data": {"sources": [{"path": str(source)}]},
        "student": {"path": str(model), "max_tokens": 32},
        "guide": {"path": str(model)},
        "cluster": {"data_workers": ACTORS},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def start(recipe: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gist_ray.cli", "prepare", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out.strip()


def content(shards: Path) -> dict[str, str]:
    """Digest of every file, the manifest and the data report included."""
    files = [file for file in sorted(shards.rglob("*")) if file.is_file()]
    return {str(file.relative_to(shards)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def segments(folder: Path) -> dict[Path, int]:
    """Finished guide vectors, with the time at which they were written."""
    return {file: file.stat().st_mtime_ns for file in (folder / "guide-vectors").rglob("[!.]*.arrow")}


def wait_for_segments(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        if len(segments(folder)) >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{count} blocks of guide vectors were not reached: {process.communicate()[1][-3000:]}")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    folder = tmp_path_factory.mktemp("undisturbed")
    shards = Path(finish(start(write_recipe(folder, source, tiny_model))))
    blocks = len(list((shards / "texts").iterdir()))
    assert len(segments(folder)) == blocks >= 5
    return content(shards), blocks


def test_a_killed_driver_loses_at_most_a_block_of_each_actor(
    undisturbed, source: Path, tiny_model: Path, tmp_path: Path
):
    whole, blocks = undisturbed
    recipe = write_recipe(tmp_path, source, tiny_model)
    process = start(recipe)
    wait_for_segments(tmp_path, 2, process)
    below = descendants(process.pid)
    process.kill()
    process.communicate()
    actors = [pid for pid, name in below.items() if name.startswith("ray::BlockEmbedder")]
    assert len(actors) == ACTORS
    wait_until_ended(actors)
    kept = segments(tmp_path)
    assert 2 <= len(kept) < blocks, "the kill came too late to show anything"

    shards = Path(finish(start(recipe)))
    assert content(shards) == whole
    after = segments(tmp_path)
    assert {file: after[file] for file in kept} == kept  # none was computed again
    assert len(after) == blocks


def test_a_killed_actor_is_replaced_and_redoes_its_block_alone(
    undisturbed, source: Path, tiny_model: Path, tmp_path: Path
):
    whole, blocks = undisturbed
    process = start(write_recipe(tmp_path, source, tiny_model))
    wait_for_segments(tmp_path, 1, process)
    actors = [pid for pid, name in descendants(process.pid).items() if name.startswith("ray::BlockEmbedder")]
    os.kill(actors[0], signal.SIGKILL)
    kept = segments(tmp_path)
    assert len(kept) < blocks, "the kill came too late to show anything"
    shards = Path(finish(process))
    assert content(shards) == whole
    after = segments(tmp_path)
    assert {file: after[file] for file in kept} == kept
    assert len(after) == blocks  # each has a name of its own: a block done twice would leave two
