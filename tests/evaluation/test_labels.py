"""Labels as lists: the same values and scores, read without a look at each row."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from gist_ray.encoder import Encoder
from gist_ray.evaluation import eval_task
from gist_ray.evaluation.labels import list_labels
from gist_ray.evaluation.pool import LocalPool
from gist_ray.evaluation.tasks import local_tasks
from gist_ray.evaluation.unit import ModelName, scored
from tests.evaluation.tiny_tasks import write_tiny_tasks


def task_with(dataset: Any, label: str | None = "label") -> Any:
    return SimpleNamespace(dataset=dataset, **({"label_column_name": label} if label else {}))


@pytest.mark.parametrize("labels", [[2, 0, 1, 0], ["b", "a", "c", "a"], [[1, 2], [], [0], [2]]])
def test_a_label_column_is_a_list_and_all_else_is_as_before(labels: list[Any]):
    plain = Dataset.from_dict({"text": ["p", "q", "r", "s"], "label": labels}).select([3, 1, 0])
    task = task_with({"en": DatasetDict(train=plain, test=plain)})
    list_labels(task)
    listed = task.dataset["en"]["test"]
    assert isinstance(task.dataset["en"], DatasetDict) and listed["label"] is listed["label"]
    assert listed["label"] == [labels[3], labels[1], labels[0]] == plain["label"][:]
    assert listed[1] == plain[1] and listed[:2] == plain[:2] and list(listed["text"]) == list(plain["text"])
    assert list(listed) == list(plain) and listed.select([2, 0])[:] == plain.select([2, 0])[:]
    assert listed.map(lambda row: {"n": len(row["text"])})["n"][:] == [1, 1, 1]


def test_what_has_no_labels_is_left_alone():
    plain = Dataset.from_dict({"text": ["p"]})
    for label in (None, "label"):
        task = task_with({"test": plain}, label)
        list_labels(task)
        assert task.dataset["test"] is plain


def test_scores_are_those_of_columns_and_no_label_is_read_by_row(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_tiny_tasks(tmp_path)
    pool, name = LocalPool(Encoder.load(tiny_model)), ModelName("local/tiny", "0")
    tasks = [task for task in local_tasks(tmp_path) if task.type in ("Classification", "Clustering")]
    assert {task.type for task in tasks} == {"Classification", "Clustering"}
    arrays: list[Any] = []
    column = type(Dataset.from_dict({"label": [0]})["label"])
    monkeypatch.setattr(column, "__iter__", lambda self: arrays.append(self) or iter(self[:]))
    listed = [scored(task, pool, name) for task in tasks]
    rows_read = sum(len(labels) for labels in arrays)
    monkeypatch.setattr(eval_task, "list_labels", lambda task: None)
    plain = [scored(task, pool, name) for task in tasks]
    assert [unit.score for unit in listed] == [unit.score for unit in plain]
    assert [unit.predictions for unit in listed] == [unit.predictions for unit in plain]
    assert sum(len(labels) for labels in arrays) - rows_read > 20 * max(rows_read, 1)
