"""Which texts are told of that make short batches."""

from pathlib import Path

import pytest

from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards
from gist_ray.training.crowding import crowded_tasks
from gist_ray.training.loop import planner_for
from tests.training.test_step import recipe_for

OFTEN = "the same answer to many a question"


def said(folder: Path, student: Path, rows: list[dict[str, str]]) -> list[str]:
    recipe = recipe_for(folder, student, rows, batch_size=8)
    shards = Shards.open(prepare(recipe))
    return list(crowded_tasks(shards, planner_for(shards, recipe).epoch(0), 8))


def rows_of(task: str, count: int, crowd: int, column: str) -> list[dict[str, str]]:
    rows = [
        {"query": f"{task} question {i}", "pos": f"{task} answer {i}", "neg": f"{task} other {i}", "task_name": task}
        for i in range(count)
    ]
    return [row | {column: OFTEN} if i < crowd else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("column", ["pos", "neg"])
def test_a_text_in_more_rows_than_there_are_batches_is_named(
    column: str, tmp_path: Path, tiny_model: Path, ray_session
):
    rows = rows_of("crowded", 32, 11, column) + rows_of("even", 32, 4, column)
    (line,) = said(tmp_path, tiny_model, rows)
    assert "task crowded takes 11 batches, its 32 rows would fill 4" in line
    assert f"{OFTEN!r} stands in 11 of them" in line
    assert "train.batch_size" in line


def test_nothing_is_said_of_texts_that_fit_or_of_a_batch_more(tmp_path: Path, tiny_model: Path, ray_session):
    assert said(tmp_path, tiny_model, rows_of("even", 32, 5, "pos")) == []
