import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gist_ray.errors import InputError
from gist_ray.recipe_file import load_recipe
from gist_ray.tour import quickstart_recipe, read_verses, write_data


def test_training_texts_and_held_out_books_do_not_meet(tmp_path: Path):
    from gist_ray.evaluation.tasks import local_tasks

    verses = read_verses()
    assert len(verses) > 31_000
    write_data(verses, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "triplets.jsonl").read_text().splitlines()]
    held_out = {text for verse in verses if verse.book in (20, 44, 45) for text in (verse.web, verse.ylt)}
    assert rows and not held_out & {text for row in rows for text in (row["query"], row["pos"])}
    [task] = local_tasks(tmp_path / "evaluation")
    assert (task.name, task.type) == ("VerseRetrieval", "Retrieval")
    before = (tmp_path / "triplets.jsonl").stat().st_mtime_ns
    write_data(verses, tmp_path)
    assert (tmp_path / "triplets.jsonl").stat().st_mtime_ns == before


def test_the_recipe_is_the_shipped_one_with_paths(tmp_path: Path):
    ours, shipped = quickstart_recipe(tmp_path / "out"), load_recipe("quickstart")
    assert ours.run_dir() == tmp_path / "out"
    assert (ours.train, ours.loss, ours.student.layers) == (shipped.train, shipped.loss, shipped.student.layers)
    assert Path(ours.student.path).is_dir() and ours.student.path == ours.guide.path


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    import gist_ray.tour

    monkeypatch.setattr(gist_ray.tour, "_PACKAGES", ("pythonbible_klingon",))
    with pytest.raises(InputError, match=r'pip install "gist-ray\[quickstart\]"'):
        read_verses()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_road(tmp_path: Path):
    """As a newcomer runs it: exit 0, a gain that is there, nothing left running, and a second run that is quick."""
    command = [sys.executable, "-m", "gist_ray.cli", "quickstart"]
    options = {"text": True, "cwd": tmp_path, "env": os.environ | {"GIST_RAY_TEST_MARK": str(tmp_path)}}
    out = tmp_path / "gist-ray-quickstart"
    first = subprocess.run(command, capture_output=True, timeout=900, **options)
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stdout == f"{out / 'report.html'}\n"
    facts = json.loads((out / "report.json").read_text())
    gain = facts["metrics"]["ndcg_at_10"]
    assert 0 < gain["ci95"][0] < gain["after"] - gain["before"] < gain["ci95"][1]
    assert facts["masked_share"] > 0 and len(facts["answers"]) == 3
    page = (out / "report.html").read_text()
    assert f"{gain['after']:.4f}" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert _left_running(str(tmp_path)) == []

    started = time.monotonic()
    second = subprocess.run(command, capture_output=True, timeout=300, **options)
    assert second.returncode == 0, second.stderr[-3000:]
    assert time.monotonic() - started < 120
    assert json.loads((out / "report.json").read_text())["metrics"] == facts["metrics"]
    assert _left_running(str(tmp_path)) == []

    # The README's snippet, word for word, on the model that this left behind.
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    [snippet] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    printed = subprocess.run([sys.executable, "-c", snippet], capture_output=True, timeout=120, **options)
    assert printed.returncode == 0, printed.stderr[-3000:]
    scores = [[float(x) for x in row.split()] for row in re.findall(r"[\d. e+-]+(?=\])", printed.stdout)]
    assert scores[0][1] > scores[0][2] + 0.2 and abs(scores[0][0] - 1) < 1e-3


def _left_running(mark: str) -> list[str]:
    """Command lines of processes that carry the test's mark in their environment; a few seconds to end are fine."""
    deadline = time.monotonic() + 20
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
            except OSError:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)
