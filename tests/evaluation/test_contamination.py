import json

import pytest

from gist_ray.evaluation.contamination import trained_on, training_sets


def test_a_model_that_mteb_knows_names_its_tasks():
    found = training_sets("avsolatorio/GIST-all-MiniLM-L6-v2")
    assert trained_on({"training_sets": found}, "Banking77Classification")
    assert not trained_on({"training_sets": found}, "STSBenchmark")
    assert training_sets("no/such-model") == []


def test_a_folder_names_its_sources_and_those_of_its_student(tmp_path):
    student = tmp_path / "student"
    student.mkdir()
    (student / "gist_ray.json").write_text(json.dumps({"recipe": {"data": {"sources": [{"path": "hf://a/scifact"}]}}}))
    model = tmp_path / "model"
    model.mkdir()
    recipe = {"data": {"sources": [{"path": "/data/banking77.jsonl.gz"}]}, "student": {"path": str(student)}}
    (model / "gist_ray.json").write_text(json.dumps({"recipe": recipe}))
    found = {"training_sets": training_sets(model)}
    assert trained_on(found, "Banking77Classification") and trained_on(found, "SciFact")
    assert not trained_on(found, "EmotionClassification")
    assert training_sets(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "task", "same"),
    [
        ("banking77", "Banking77Classification", True),
        ("STS-Benchmark", "STSBenchmark", True),
        ("tweet_sentiment_extraction", "TweetSentimentExtractionClassification", True),
        ("sts", "STS12", False),
        ("emotion", "Banking77Classification", False),
    ],
)
def test_names_are_compared_as_people_would(name, task, same):
    assert trained_on({"training_sets": [name]}, task) == same
