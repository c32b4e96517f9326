"""Kill -9 of the driver in mid-embedding: the output ends as if nothing had happened, and no block is done twice."""

import hashlib
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.faults.processes import descendants, wait_until_ended

pytestmark = pytest.mark.slow

LINES = 24_000
ACTORS = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verses with numbers before them: enough distinct texts for several blocks."""
    from gist_ray.tour import read_verses

    file = tmp_path_factory.mktemp("source") / "lines.txt"
    verses = read_verses()
    file.write_text("".join(f"{i % (LINES - 500)} {verses[i % (LINES - 500)].web}\n" for i in range(LINES)))
    return file


def start(source: Path, model: Path, out: Path, workers: int = ACTORS) -> subprocess.Popen[str]:
    options = ["--out", str(out), "--workers", str(workers), "--backend", "torch"]
    command = [sys.executable, "-m", "gist_ray.cli", "embed", str(model), str(source), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], out: Path) -> str:
    printed, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    assert printed == f"{out}\n"
    return hashlib.sha256(out.read_bytes()).hexdigest()


def blocks(out: Path) -> dict[str, int]:
    """The finished blocks, and which file each is. One is finished when its report is there, which comes second."""
    work = out.parent / f".{out.name}.gist_ray" / ".work"
    found = {}
    for report in (work / "staging").glob("block-*.json"):
        file = work / "vectors" / f"{report.stem}.arrow"
        with suppress(FileNotFoundError):  # the end of a run removes them
            found[file.name] = file.stat().st_ino
    return found


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(source: Path, tiny_model: Path, tmp_path: Path):
    whole = finish(start(source, tiny_model, tmp_path / "whole.npy", workers=1), tmp_path / "whole.npy")
    out = tmp_path / "killed.npy"
    process = start(source, tiny_model, out)
    deadline = time.monotonic() + 120
    while len(blocks(out)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    below = descendants(process.pid)
    process.kill()
    process.communicate()
    actors = [pid for pid, name in below.items() if name.startswith("ray::BlockVectors")]
    assert len(actors) == ACTORS
    wait_until_ended(actors)
    kept = blocks(out)
    assert 2 <= len(kept) < 6 and not out.exists(), "the kill came too late to show anything"

    again = start(source, tiny_model, out)
    after = dict(kept)
    while again.poll() is None:
        after |= blocks(out)  # at the end they are removed one by one
        time.sleep(0.01)
    assert finish(again, out) == whole
    assert len(after) == 6 and {name: after[name] for name in kept} == kept  # none was done again
    assert np.load(out, mmap_mode="r").shape == (LINES, 32)
