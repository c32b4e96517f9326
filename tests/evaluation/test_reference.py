import json

import pytest

from gist_ray.errors import InputError
from gist_ray.evaluation.reference import check_report, checks, reference_model

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def row(name, score, kind="STS", notes=()):
    return {"name": name, "type": kind, "score": score, "notes": list(notes)}


def test_scores_are_held_against_the_published_ones():
    rows = [
        row("STSBenchmark", 0.8203),
        row("STS13", 0.7),
        row("Banking77Classification", 0.795, "Classification"),
        row("TwitterURLCorpus", 0.1, "PairClassification", ["9 items, MTEB's has 10: not comparable with published"]),
        row("Own", 0.5),
    ]
    found = checks(rows, MINILM)
    assert [(check.task, check.holds) for check in found] == [
        ("STSBenchmark", True),
        ("STS13", False),
        ("Banking77Classification", True),
    ]
    assert [check.published for check in found] == pytest.approx([82.03, 80.60, 80.04], abs=0.01)


def test_models_are_found_by_their_name():
    assert reference_model("all-MiniLM-L6-v2") == reference_model("models/all-MiniLM-L6-v2") == MINILM
    with pytest.raises(InputError, match=f"no published scores for mine; they are known for .*{MINILM}"):
        reference_model("mine")


def test_a_report_without_known_tasks_is_not_called_right(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"tasks": [row("Own", 0.5)]}))
    with pytest.raises(InputError, match="none of the tasks"):
        check_report(tmp_path, MINILM)
