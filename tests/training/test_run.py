"""Ray Train + DeepSpeed for real, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gist_ray.config import Recipe
from gist_ray.data.shards import Shards
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.manifest import read_manifest
from gist_ray.metrics import read_metrics
from gist_ray.model_folder import export, model_card
from gist_ray.recipe_file import parse_recipe
from gist_ray.training.checkpoint import SavedState, progress_of, student_folder
from gist_ray.training.run import train
from gist_ray.training.validation import held_out_rows, score
from tests.test_metrics import curve

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
        tree[name] = {**tree.get(name, {}), **section}
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
    phases = lines[0].pop("phases")
    assert all(len(seconds) == 2 for seconds in phases.values()) and sum(phases["backward"]) > 0
    assert set(lines[0]) == set(
        "step total_steps epoch learning_rate loss masked_share batch_size examples_per_s tokens_per_s padding_share "
        "recomputed_share seconds clock_s workers grad_norm eta_s rows_crc32".split()
    )
    assert max(line["masked_share"] for line in lines) > 0
    assert lines[0]["learning_rate"] < lines[2]["learning_rate"] == pytest.approx(1e-3, rel=0.1)
    assert list((trained.run_dir() / "tensorboard").iterdir())
    events = [(e["event"], e["step"]) for e in read_metrics(trained.run_dir() / "events.jsonl")]
    assert events == [("start", 0), ("checkpoint", lines[-1]["step"])]


def test_the_checkpoint_tells_how_it_was_made(trained: Recipe):
    out = trained.checkpoint_dir()
    assert "where the time went" in (out / "train_report.html").read_text().lower()
    progress = progress_of(str(out))
    assert progress is not None and progress["step"] == progress["total_steps"] and progress["parts"] == 2
    assert not list(trained.run_dir().glob("train-*"))  # what was needed to resume is gone


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
    wrong = recipe.model_copy(update={"student": recipe.student.model_copy(update={"layers": (0, 5)})})
    with pytest.raises(InputError, match="layers 0 to 1"):
        train(wrong)


def test_the_best_checkpoint_is_the_result(tiny_model: Path, verse_rows, tmp_path: Path):
    """A learning rate that ruins the student after its first epoch: the last checkpoint is not the best."""
    recipe = recipe_for(
        tmp_path,
        tiny_model,
        verse_rows[:256],
        train={"checkpoint_steps": 2, "keep_checkpoints": 3, "learning_rate": 0.3, "warmup_ratio": 1.0, "epochs": 1},
        validation={"rows": 40},
        cluster={"num_workers": [1, 2]},
    )
    out = train(recipe)
    manifest, progress = read_manifest(out), progress_of(str(out))
    scores = {line["step"]: line["score"] for line in read_metrics(out / "validation.jsonl")}
    assert manifest is not None and progress is not None
    assert len(scores) == 4 and manifest["validation"] == max(scores.values()) == scores[progress["step"]]
    board = {step: pytest.approx(value) for step, value in curve(recipe.run_dir(), "validation/score", "validation")}
    assert board == scores  # also of the last checkpoint, which was scored when worker 0 had ended
    assert progress["step"] < progress["total_steps"]
    opened = Shards.open(recipe.shards_dir())
    again = score(Encoder.load(out / "student"), opened, held_out_rows(opened.triplets, 40, recipe.train.seed))
    assert again.metrics(opened.tasks)["score"] == pytest.approx(manifest["validation"], abs=1e-6)


def test_adapters_are_merged_into_the_student(tiny_model: Path, verse_rows, tmp_path: Path, caplog):
    lora = {"rank": 4, "alpha": 8}
    rows = [row | {"pos": verse_rows[0]["pos"]} if i < 12 else row for i, row in enumerate(verse_rows[:128])]
    recipe = recipe_for(
        tmp_path, tiny_model, rows, train={"lora": lora, "epochs": 1, "zero_stage": 2, "batch_size": 16}
    )
    out = train(recipe)
    # Beside all this: a crowded task is told of.
    assert "task book-0 takes 6 batches, its 64 rows would fill 4" in caplog.text
    saved = SavedState(out)
    assert saved.names() and all("lora_" in name for name in saved.names())
    before, after = Encoder.load(tiny_model), Encoder.load(out / "student")
    assert set(dict(before.model.named_parameters())) == set(dict(after.model.named_parameters()))
    assert np.abs(before.encode(["a verse"]) - after.encode(["a verse"])).max() > 1e-4


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
    assert "first weights" not in card and "other options" not in card
    provenance["recipe"]["loss"] |= {"soft_label_weight": 0.7, "show_other_labels": True}
    told = "| other options of the loss | `show_other_labels: true`, `soft_label_weight: 0.7` |\n| data fingerprint |"
    assert told in model_card("run", provenance)
    provenance["recipe"]["train"]["start_share"] = 0.3
    assert "| share of the student's first weights | 0.3 |\n| learning rate |" in model_card("run", provenance)


def test_export_mixes_in_another_share_of_the_start(trained: Recipe, tiny_model: Path, tmp_path: Path):
    folders = tiny_model, trained.checkpoint_dir() / "student"
    start, end = (dict(Encoder.load(folder).model.named_parameters()) for folder in folders)
    out = export(trained.checkpoint_dir(), tmp_path / "model", start_share=0.75)
    for name, mixed in Encoder.load(out).model.named_parameters():
        torch.testing.assert_close(mixed, 0.75 * start[name] + 0.25 * end[name], rtol=0, atol=1e-6)
    assert "| share of the student's first weights | 0.75 |" in (out / "README.md").read_text()
    with pytest.raises(InputError, match=r"start_share: 0\.75 -> null"):  # not the same model
        export(trained.checkpoint_dir(), out)
    with pytest.raises(InputError, match=r"start_share`: Input should be less than 1 \(got 1\)"):
        export(trained.checkpoint_dir(), tmp_path / "one", start_share=1)
    with pytest.raises(InputError, match="not a finished checkpoint"):
        export(tiny_model, tmp_path / "int8", int8=True, start_share=0.5)


def test_export_refuses_what_it_cannot_use(trained: Recipe, tmp_path: Path):
    with pytest.raises(InputError, match="not a finished checkpoint"):
        export(tmp_path, tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        export(trained.checkpoint_dir(), tmp_path / "full")
    with pytest.raises(InputError, match="not a finished report"):
        export(trained.checkpoint_dir(), tmp_path / "model", report=tmp_path)
