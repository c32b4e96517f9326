"""How many of a task's texts a model was trained on, from the shards to the verdict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.data.texts import KEY_BYTES, text_key
from gist_ray.encoder import Encoder
from gist_ray.evaluation.compare import compare
from gist_ray.evaluation.contamination import contamination
from gist_ray.evaluation.pool import LocalPool
from gist_ray.evaluation.run import evaluate
from gist_ray.evaluation.tasks import local_tasks
from gist_ray.evaluation.training_texts import Seen, TrainingTexts
from gist_ray.evaluation.unit import ModelName, scored
from gist_ray.training.run import checkpoint_fingerprint
from tests.evaluation.tiny_tasks import write

texts = st.text(alphabet=st.sampled_from("ab \0é"), max_size=3)


@given(trained=st.lists(texts), asked=st.lists(texts))
def test_known_is_membership_to_the_letter(trained: list[str], asked: list[str]):
    keys = np.sort(np.array([text_key(text) for text in set(trained)], dtype=f"S{KEY_BYTES}"))
    found = TrainingTexts(keys)
    assert found.known(asked).tolist() == [text in trained for text in asked]
    seen: Seen = {}
    found.count(seen, "test", asked)
    assert seen == {"test": (len(set(asked)), len(set(asked) & set(trained)))}


def rows(file: Path) -> list[dict[str, Any]]:
    import gzip

    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def model(ray_session, tiny_model: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As exported after training on Banking77's training split and on a tenth of STSBenchmark's test pairs."""
    folder = tmp_path_factory.mktemp("trained")
    train = [row["text"] for row in rows(tiny / "Banking77Classification/train.jsonl.gz")]
    leaked = rows(tiny / "STSBenchmark/test.jsonl.gz")[:4]
    pairs = [*zip(train, train[1:] + train[:1], strict=True), *((row["sentence1"], row["sentence2"]) for row in leaked)]
    write(folder / "rows.jsonl", [{"query": query, "pos": pos} for query, pos in pairs])
    tree = {
        "name": "run",
        "output_dir": str(folder),
        "data": {"sources": [{"path": str(folder / "rows.jsonl")}]},
        "student": {"path": str(tiny_model)},
        "guide": {"path": str(tiny_model)},
    }
    recipe = Recipe.model_validate(tree)
    shards = prepare(recipe)
    shutil.copytree(tiny_model, folder / "model")
    provenance = {
        "recipe": recipe.model_dump(mode="json"),
        "fingerprint": checkpoint_fingerprint(recipe, shards),  # as `train` and `export` write it
    }
    (folder / "model/gist_ray.json").write_text(json.dumps(provenance))
    return folder / "model"


def test_parts_of_a_task_are_counted_each(model: Path, tiny: Path):
    trained = TrainingTexts.of(model)
    assert trained is not None
    pool = LocalPool(Encoder.load(model))
    tasks = {task.name: task for task in local_tasks(tiny)}
    seen = {
        name: scored(tasks[name], pool, ModelName("local/m", "0" * 40), trained).seen or {}
        for name in ("Banking77Classification", "STSBenchmark", "TinyReranking")
    }
    asked, known = seen["Banking77Classification"]["train"]
    assert asked == known > 0
    assert seen["Banking77Classification"]["test"][1] == 0
    first, second = ([row[f"sentence{i}"] for row in rows(tiny / "STSBenchmark/test.jsonl.gz")] for i in (1, 2))
    assert seen["STSBenchmark"]["test"] == (
        len(set(first)) + len(set(second)),
        len(set(first) & {*first[:4], *second[:4]}) + len(set(second) & {*first[:4], *second[:4]}),
    )
    assert {part: known for part, (_, known) in seen["TinyReranking"].items()} == {"queries": 0, "documents": 0}


def test_reports_and_verdicts_say_so(local_pool, model: Path, tiny_model: Path, tiny: Path, tmp_path: Path):
    after = evaluate(model, output_dir=tmp_path / "after", data=tiny)
    before = evaluate(tiny_model, output_dir=tmp_path / "before", data=tiny)
    report = json.loads((after / "report.json").read_text())
    why = {row["name"]: contamination(report, row) for row in report["tasks"]}
    assert "train 100 %" in why["Banking77Classification"]
    page = (after / "report.html").read_text()
    assert "Trained on" in page and "train 100 %" in page
    unknown = json.loads((before / "report.json").read_text())
    assert all(row["trained_on"] is None for row in unknown["tasks"])
    assert "Trained on" not in (before / "report.html").read_text()
    found = {task.name: task.trained_on for task in compare(before, after).tasks}
    assert found["Banking77Classification"].startswith("local/model (") and found["TinyClusters"].count("(") <= 1


def test_shards_that_are_gone_or_others_tell_nothing(model: Path, tiny_model: Path, tmp_path: Path):
    assert TrainingTexts.of(tiny_model) is None and TrainingTexts.of("org/name") is None
    moved = shutil.copytree(model, tmp_path / "model")
    provenance = json.loads((moved / "gist_ray.json").read_text())
    for change in (
        {"fingerprint": {"shards": "of others"}},
        {"recipe": {**provenance["recipe"], "output_dir": str(tmp_path)}},
    ):
        (moved / "gist_ray.json").write_text(json.dumps(provenance | change))
        assert TrainingTexts.of(moved) is None
