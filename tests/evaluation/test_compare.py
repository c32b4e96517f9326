import json
from pathlib import Path

import numpy as np
import pytest

from gist_ray.errors import InputError
from gist_ray.evaluation.compare import compare, table
from gist_ray.evaluation.items import Group, Items
from gist_ray.evaluation.store import items_file

QUERIES = 300


def write_report(folder: Path, model: str, gains: dict[str, float], *, seed: int, training_sets=()) -> Path:
    """A report of tasks whose queries have a difficulty of their own; `gains` are what the model adds to each."""
    tasks = []
    for number, (name, gain) in enumerate(gains.items()):
        difficulty = np.random.default_rng(number).uniform(0.2, 0.8, QUERIES)
        noise = np.random.default_rng([seed, number]).normal(0, 0.05, QUERIES)
        values = difficulty + gain + noise
        file = items_file(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        Items("mean", (Group("default/test", values),)).write(file)
        tasks.append({"name": name, "revision": f"data of {name}", "type": "Retrieval", "score": float(values.mean())})
    report = {"model": model, "revision": f"{seed:040d}", "tasks": tasks, "training_sets": list(training_sets)}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_each_task_and_the_whole_are_judged(tmp_path):
    before = write_report(tmp_path / "a", "local/a", dict.fromkeys(["Up", "Same", "Down", "Gone"], 0.0), seed=1)
    gains = {"Up": 0.03, "Same": 0.0, "Down": -0.03, "New": 0.0}
    after = write_report(tmp_path / "b", "local/b", gains, seed=2, training_sets=["up"])
    found = compare(before, after, output=tmp_path / "out", samples=500)
    outcomes = {task.name: task.outcome for task in found.tasks}
    assert outcomes == {"Up": "win", "Same": "tie", "Down": "loss"}
    assert found.left_out == ("Gone", "New")
    up = found.tasks[0]
    assert up.low < up.after - up.before < up.high and up.after - up.before == pytest.approx(3, abs=1)
    assert up.p <= up.p_holm and up.trained_on == "local/b (by name)" and found.tasks[1].trained_on == ""
    assert "cannot be told apart" in found.verdict and "1 better, 1 not told apart, 1 worse" in found.verdict
    text = table(found)
    assert text.splitlines()[-1] == found.verdict and "not in both reports on the same data: Gone, New" in text
    stored = json.loads((tmp_path / "out/compare.json").read_text())
    assert stored["verdict"] == found.verdict and len(stored["tasks"]) == 3
    assert found.verdict.split(":")[0] in (tmp_path / "out/compare.html").read_text()


@pytest.mark.parametrize(("gain", "word"), [(0.02, "better"), (-0.02, "worse")])
def test_a_change_everywhere_is_a_verdict(tmp_path, gain, word):
    names = ["A", "B", "C"]
    before = write_report(tmp_path / "a", "local/m", dict.fromkeys(names, 0.0), seed=1)
    after = write_report(tmp_path / "b", "local/m", dict.fromkeys(names, gain), seed=2)
    found = compare(before, after, samples=500)
    assert f"is {word} than" in found.verdict and found.p < 0.01
    assert found.before == "local/m@00000000" and found.after.startswith("local/m@")  # one name, two checkpoints


def test_a_task_without_items_is_shown_and_not_judged(tmp_path):
    reports = [
        write_report(tmp_path / name, f"local/{name}", {"A": 0.0, "B": 0.0}, seed=i) for i, name in enumerate("ab")
    ]
    items_file(reports[0], "B").unlink()
    found = compare(*reports, samples=100)
    assert found.tasks[1].outcome == "untested" and found.tasks[1].p is None
    assert "untested" in table(found)


def test_false_positives_are_as_rare_as_promised(tmp_path):
    """Pairs that are equal, five tasks each: a whole pair may show a task, or a mean, that is not there in 5 of 100."""
    wrong = 0
    for seed in range(40):
        pair = [
            write_report(tmp_path / f"{seed}{name}", f"local/{name}", dict.fromkeys("VWXYZ", 0.0), seed=2 * seed + i)
            for i, name in enumerate("ab")
        ]
        found = compare(*pair, samples=300)
        wrong += any(task.outcome != "tie" for task in found.tasks)
    assert wrong <= 6  # 2 expected; more by chance in 1 of 200 runs


def test_what_is_no_report_is_named(tmp_path):
    report = write_report(tmp_path / "a", "local/a", {"A": 0.0}, seed=1)
    with pytest.raises(InputError, match="absent is no report"):
        compare(report, tmp_path / "absent")
    other = write_report(tmp_path / "b", "local/b", {"B": 0.0}, seed=1)
    with pytest.raises(InputError, match="no task in common on the same data"):
        compare(report, other)
    changed = write_report(tmp_path / "c", "local/c", {"A": 0.0}, seed=1)
    Items("mean", (Group("default/test", np.zeros(3)),)).write(items_file(changed, "A"))
    with pytest.raises(InputError, match="A: a paired comparison needs the same items"):
        compare(report, changed)
