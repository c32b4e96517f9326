"""Ray Train + DeepSpeed for real, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gist_ray.config import Recipe
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.manifest import read_manifest
from gist_ray.metrics import read_metrics
from gist_ray.model_folder import export
from gist_ray.recipe_file import parse_recipe
from gist_ray.training.checkpoint import student_folder
from gist_ray.training.run import train

pytestmark = pytest.mark.usefixtures("ray_session")


def recipe_for(folder: Path, model: Path, rows: list[dict[str, Any]], **sections: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "data": {"sources": [{"path": str(folder / "a.jsonl")}]},
        "student": {"path": str(model), "max_tokens": 32},
        "guide": {"path": str(model)},
        "train": {"batch_size": 32, "epochs": 2, "learning_rate": 1e-3, "dropout": 0.0},
        "loss": {"temperature": 0.05},
        "cluster": {"num_workers": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section}
    return parse_recipe(tree)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, verse_rows, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = recipe_for(tmp_path_factory.mktemp("train"), tiny_model, verse_rows[:256])
    assert train(recipe) == recipe.checkpoint_dir()
    return recipe


def test_two_workers_lower_the_loss(trained: Recipe):
    lines = read_metrics(trained.run_dir() / "metrics.jsonl")
    manifest = read_manifest(trained.checkpoint_dir())
    assert manifest is not None and [line["step"] for line in lines] == list(range(1, manifest["steps"] + 1))
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert set(lines[0]) == {
        "step",
        "total_steps",
        "learning_rate",
        "loss",
        "masked_share",
        "examples_per_s",
        "tokens_per_s",
    }
    assert max(line["masked_share"] for line in lines) > 0
    assert lines[0]["learning_rate"] < lines[2]["learning_rate"] == pytest.approx(1e-3, rel=0.1)
    assert list((trained.run_dir() / "tensorboard").iterdir())


def test_the_checkpoint_is_a_model_that_has_moved(trained: Recipe, tiny_model: Path):
    before, after = Encoder.load(tiny_model), Encoder.load(student_folder(trained.checkpoint_dir()))
    assert after.max_tokens == 32
    assert np.abs(before.encode(["a verse"]) - after.encode(["a verse"])).max() > 1e-3


def test_a_finished_run_returns_at_once_and_another_making_is_refused(trained: Recipe):
    metrics = trained.run_dir() / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    assert train(trained) == trained.checkpoint_dir()
    assert metrics.stat().st_mtime_ns == written
    changed = trained.model_copy(update={"train": trained.train.model_copy(update={"learning_rate": 1e-4})})
    with pytest.raises(InputError, match=r"train\.learning_rate: 0\.001 -> 0\.0001"):
        train(changed)


def test_one_worker_gives_the_run_of_two(trained: Recipe, tiny_model: Path, verse_rows, tmp_path: Path):
    """The number of workers changes rounding only: same order, same losses, same weights; here under ZeRO 0."""
    alone = recipe_for(tmp_path, tiny_model, verse_rows[:256], cluster={"num_workers": 1}, train={"zero_stage": 0})
    train(alone)
    ours = [line["loss"] for line in read_metrics(alone.run_dir() / "metrics.jsonl")]
    theirs = [line["loss"] for line in read_metrics(trained.run_dir() / "metrics.jsonl")]
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)
    texts = [row["query"] for row in verse_rows[:50]]
    vectors = [Encoder.load(student_folder(r.checkpoint_dir())).encode(texts) for r in (alone, trained)]
    np.testing.assert_allclose(*vectors, atol=2e-3)


def test_an_unfinished_run_wants_resume_and_bad_students_fail_early(tiny_model: Path, verse_rows, tmp_path: Path):
    from gist_ray.data.prepare import prepare
    from gist_ray.manifest import digest_of
    from gist_ray.training.run import checkpoint_fingerprint

    recipe = recipe_for(tmp_path, tiny_model, verse_rows[:40])
    digest = digest_of(checkpoint_fingerprint(recipe, prepare(recipe)))
    (recipe.run_dir() / f"train-{digest[:8]}").mkdir(parents=True)
    with pytest.raises(InputError, match="--resume"):
        train(recipe)
    (recipe.run_dir() / f"train-{digest[:8]}.json").write_text('{"num_workers": 3}')
    with pytest.raises(InputError, match="started on 3 workers and ZeRO 1 cannot resume it on 2"):
        train(recipe, resume=True)
    wrong = recipe.model_copy(update={"student": recipe.student.model_copy(update={"layers": (0, 5)})})
    with pytest.raises(InputError, match="layers 0 to 1"):
        train(wrong)


def test_export_makes_a_folder_that_everybody_loads(trained: Recipe, tmp_path: Path, verse_rows):
    from sentence_transformers import SentenceTransformer

    out = export(trained.checkpoint_dir(), tmp_path / "model")
    assert export(trained.checkpoint_dir(), out) == out
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    texts = [row["query"] for row in verse_rows[:20]]
    np.testing.assert_allclose(SentenceTransformer(str(out)).encode(texts), Encoder.load(out).encode(texts), atol=1e-5)
    card = (out / "README.md").read_text()
    for part in ("library_name: sentence-transformers", "# run", "32 dimensions", "learning rate | 0.001", "a.jsonl"):
        assert part in card
    assert str(tmp_path.parent) not in card  # a card is read elsewhere
    provenance = json.loads((out / "gist_ray.json").read_text())
    assert provenance["recipe"]["name"] == "run" and provenance["steps"] > 0


def test_export_refuses_what_it_cannot_use(trained: Recipe, tmp_path: Path):
    with pytest.raises(InputError, match="not a finished checkpoint"):
        export(tmp_path, tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        export(trained.checkpoint_dir(), tmp_path / "full")
    with pytest.raises(InputError, match="not a finished report"):
        export(trained.checkpoint_dir(), tmp_path / "model", report=tmp_path)
