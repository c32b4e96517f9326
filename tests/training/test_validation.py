"""Held-out rows never reach training, ranks are those of a naive reference, and Ray Train finds the best checkpoint."""

import json
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.config import Recipe
from gist_ray.data.plan import Planner
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import NO_LABEL, Shards, Triplets
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.evaluation.tasks import local_tasks
from gist_ray.metrics import VALIDATIONS, read_metrics
from gist_ray.recipe_file import parse_recipe
from gist_ray.training import validation
from gist_ray.training.checkpoint import Snapshot, progress_of
from gist_ray.training.validation import (
    SCORE,
    UNSCORED,
    Score,
    best_checkpoint,
    held_out_rows,
    ranked,
    ray_validation,
    score,
    task_metrics,
    training_weights,
    validate_checkpoint,
)


def columns(query, positive, negative=None, task=None) -> Triplets:
    rows = len(query)
    return Triplets(
        query=np.asarray(query, dtype=np.int64),
        positive=np.asarray(positive, dtype=np.int64),
        negative_starts=np.arange(rows + 1) if negative is not None else np.zeros(rows + 1, dtype=np.int64),
        negatives=np.asarray([] if negative is None else negative, dtype=np.int64),
        task=np.zeros(rows, dtype=np.int64) if task is None else np.asarray(task, dtype=np.int64),
        source=np.zeros(rows, dtype=np.int64),
        label=np.full(rows, NO_LABEL),
    )


@st.composite
def triplets_and_wanted(draw: st.DrawFn) -> tuple[Triplets, int]:
    """Few texts, so that rows share queries, and queries stand as positives; task 1 stays empty, as a task may."""
    rows = draw(st.integers(1, 80))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    query, positive = generator.integers(0, 41, size=(2, rows))
    task = generator.choice([0, 2, 3], p=[0.7, 0.25, 0.05], size=rows)
    return columns(query, positive, task=task), draw(st.integers(0, rows + 3) | st.integers(0, 6))


@settings(max_examples=200, deadline=None)
@given(triplets_and_wanted(), st.integers(0, 5))
def test_held_out_rows_are_as_many_as_asked_for_of_each_task(case: tuple[Triplets, int], seed: int):
    triplets, wanted = case
    held = held_out_rows(triplets, wanted, seed)
    np.testing.assert_array_equal(held, held_out_rows(triplets, wanted, seed))
    size = min(wanted, len(triplets))
    assert len(held) == size and (np.diff(held) > 0).all()
    assert size == 0 or (held[0] >= 0 and held[-1] < len(triplets))
    sizes, of_task = np.bincount(triplets.task), np.bincount(triplets.task[held], minlength=triplets.task.max() + 1)
    first = (sizes > 0) if wanted >= (sizes > 0).sum() else np.zeros(len(sizes), dtype=bool)
    shares = (size - first.sum()) * (sizes - first) / max(1, (sizes - first).sum())
    excess = of_task - first - shares
    assert (np.abs(excess) < 1).all()
    remainders, up = shares % 1, excess > 1e-9
    assert not up.any() or remainders[up].min() >= remainders[~up & (sizes > 0)].max(initial=0) - 1e-9
    for task in range(len(sizes)):  # whole queries, but for the last one
        there, taken = triplets.query[triplets.task == task], triplets.query[held][triplets.task[held] == task]
        assert sum((taken == query).sum() < (there == query).sum() for query in np.unique(taken)) <= 1


def test_another_seed_holds_out_other_rows():
    triplets = columns(range(1000), range(1000, 2000))
    one, other = (held_out_rows(triplets, 100, seed) for seed in (0, 1))
    assert len(np.intersect1d(one, other)) < 30
    assert 350 < np.median(one) < 650  # drawn from everywhere


@settings(max_examples=200, deadline=None)
@given(triplets_and_wanted(), st.integers(0, 5))
def test_no_held_out_query_is_trained_on(case: tuple[Triplets, int], seed: int):
    triplets, wanted = case
    held = held_out_rows(triplets, wanted, seed)
    queries = triplets.query[held]
    leaks = np.isin(triplets.query, queries) | np.isin(triplets.positive, queries)
    rows, lost = len(triplets), int(leaks.sum())
    weights = 0.5 + np.arange(rows)
    if 2 * lost > rows:
        with pytest.raises(InputError, match=rf"validation\.rows {len(held)} takes {lost} of the {rows} rows"):
            training_weights(triplets, held)
        return
    np.testing.assert_array_equal(training_weights(triplets, held), np.where(leaks, 0.0, 1.0))
    np.testing.assert_array_equal(training_weights(triplets, held, weights), np.where(leaks, 0.0, weights))
    assert (weights > 0).all()  # the caller's own array is not touched


def test_rows_that_share_only_the_positive_or_a_negative_stay(caplog: pytest.LogCaptureFixture):
    #                   held     same query  turned  query as positive  same positive  query as negative
    triplets = columns([0, 50, 0, 10, 3, 5, 6, 7, 8], [10, 51, 11, 0, 0, 10, 60, 61, 62], [1, 1, 1, 1, 1, 1, 0, 1, 1])
    with caplog.at_level("INFO", "gist_ray.training.validation"):
        weights = training_weights(triplets, np.array([0]))
    assert weights.tolist() == [0, 1, 0, 0, 0, 1, 1, 1, 1]
    assert "1 rows held out; 3 more" in caplog.text


def test_the_planner_never_shows_a_row_of_weight_0():
    generator = np.random.default_rng(0)
    query, positive, negative = (generator.integers(0, 400, size=600) for _ in range(3))
    triplets = columns(query, positive, negative, task=generator.integers(0, 3, size=600))
    held = held_out_rows(triplets, 60, seed=3)
    weights = training_weights(triplets, held)
    assert 60 <= (weights == 0).sum() < 300
    for shown, times in [(weights, 1), (2 * weights, 2), (weights / 2, None)]:
        planner = Planner(triplets, np.full(400, 9), batch_size=16, seed=5, weights=shown)
        counts = sum(np.bincount(planner.epoch(epoch).rows, minlength=600) for epoch in range(4))
        assert (counts[weights == 0] == 0).all()
        expected = 4 * times if times else 2
        np.testing.assert_array_equal(counts[weights > 0], expected)


def test_a_million_rows_take_a_moment():
    generator = np.random.default_rng(0)
    query, positive = (generator.integers(0, 2_000_000, size=1_000_000) for _ in range(2))
    triplets = columns(query, positive, task=generator.integers(0, 300, size=1_000_000))
    started = time.perf_counter()
    held = held_out_rows(triplets, 2000, seed=0)
    training_weights(triplets, held)
    assert time.perf_counter() - started < 5  # 0.4 s on an idle machine
    assert len(np.unique(triplets.task[held])) == 300


def unit(rows: list[list[float]]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


QUERY, POSITIVE, OTHER, FAR = 0, 1, 2, 3
NOTHING = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def place(student: torch.Tensor, guide: torch.Tensor, known=NOTHING, labels=None) -> tuple[int, int]:
    """Rank of text 1 for text 0 among texts 1, 2 and 3, and against how many."""
    rank, left = ranked(student, guide, np.array([QUERY]), np.array([POSITIVE]), np.array([1, 2, 3]), known, labels)
    return int(rank[0]), int(left[0])


def test_the_guide_hides_what_it_ranks_above_the_positive():
    student = unit([[1, 0], [0.8, 0.6], [0.9, 0.1], [0, 1]])  # OTHER is nearer to the query than POSITIVE
    agrees, equal, objects = (unit([[1, 0], [1, 0.5], other, [0, 1]]) for other in ([1, 0.4], [1, 0.5], [1, 0.6]))
    assert place(student, objects) == (2, 2)
    assert place(student, equal) == (2, 2)  # strictly above only
    assert place(student, agrees) == (1, 1)
    assert place(student, objects, (np.array([QUERY]), np.array([OTHER]))) == (1, 1)  # known to be right
    assert place(student, objects, (np.array([OTHER]), np.array([QUERY]))) == (2, 2)  # of another query
    assert place(student, objects, labels=np.array([4, 4, 4, NO_LABEL])) == (1, 1)  # of the query's label
    assert place(student, objects, labels=np.array([NO_LABEL, 4, NO_LABEL, 4])) == (2, 2)  # of a label, or of none


def test_ties_and_not_a_number_are_above_the_positive():
    guide = unit([[1, 0], [1, 0.5], [1, 0.6], [0, 1]])
    same = unit([[1, 0], [0.6, 0.8], [0.6, -0.8], [0.6, 0.8]])
    assert place(same, guide) == (3, 2)
    almost = unit([[1, 0], [0.6, 0.8], [0.6 - 1e-7, 0.8], [0, 1]])  # rounding, not a difference
    assert place(almost, guide) == (2, 2)
    assert place(torch.full((4, 2), math.nan), guide) == (3, 2)
    broken = unit([[1, 0], [0.9, 0.1], [0, 1], [0, 1]])
    broken[POSITIVE] = math.nan
    assert place(broken, guide) == (3, 2)


def test_metrics_are_the_textbook_ones():
    found = Score(np.array([1, 2, 10, 11]), np.array([20, 20, 10, 30]), np.array([0, 0, 2, 2]))
    gains = [1, 1 / math.log2(3), 1 / math.log2(11), 0]
    assert found.ndcg_at_10 == pytest.approx(np.mean(gains))
    metrics = found.metrics(["a", "never", "b"])
    assert metrics == pytest.approx(
        {
            "score": np.mean(gains),
            "mrr": (1 + 1 / 2 + 1 / 10 + 1 / 11) / 4,
            "accuracy_at_1": 0.25,
            "validation_rows": 4,
            "validation_candidates": 20,
            "score/a": np.mean(gains[:2]),
            "score/b": gains[2] / 2,
        }
    )
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert "score/a" not in found.metrics(["a"])


@pytest.fixture(scope="module")
def recipe(minilm: Path, tiny_model: Path, verse_rows, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Verses, and rows that say again what is right for some of them: other positives, the pair turned round.

    The first row's texts are one text to the guide, and its query is the second row's negative.
    """
    folder = tmp_path_factory.mktemp("validation")
    first = {**verse_rows[100], "pos": verse_rows[100]["query"].upper()}
    rows = [first, {**verse_rows[101], "neg": first["query"]}, *verse_rows[:88]]
    again = [{**row, "pos": other["neg"], "neg": None} for row, other in zip(rows[2:40], rows[4:], strict=False)]
    turned = [
        {**row, "query": other["neg"], "pos": row["query"]} for row, other in zip(rows[40:], rows[43:], strict=False)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + again + turned))
    return parse_recipe(
        {
            "name": "run",
            "output_dir": str(folder),
            "data": {"sources": [{"path": str(folder / "a.jsonl")}]},
            "student": {"path": str(minilm), "max_tokens": 32},
            "guide": {"path": str(minilm), "max_tokens": 32},
            "cluster": {"num_workers": 2, "max_failures": 1},
            "validation": {"rows": 40},
        }
    )


@pytest.fixture(scope="module")
def shards(recipe: Recipe, ray_session) -> Shards:
    return Shards.open(prepare(recipe))


def naive_ranks(encoder: Encoder, shards: Shards, rows: np.ndarray) -> list[tuple[int, int]]:
    """Rank and candidates of each row by loops over float64 cosines; less than 1e-6 apart is a tie."""
    triplets = shards.triplets
    pairs = set(zip(triplets.query.tolist(), triplets.positive.tolist(), strict=True))
    held = [(int(triplets.query[i]), int(triplets.positive[i]), triplets.negatives_of(np.array([i]))) for i in rows]
    candidates = {p for _, p, _ in held} | {n for _, _, negatives in held for n in negatives.tolist()}
    texts = np.array(sorted(candidates | {q for q, _, _ in held}))
    with torch.inference_mode():
        vectors = encoder.embed(shards.texts.tokens(texts), batch_tokens=512).double().numpy()
    student = dict(zip(texts.tolist(), vectors, strict=True))
    guide = dict(zip(texts.tolist(), shards.texts.guide(texts).astype(np.float64), strict=True))
    found = []
    for q, p, _ in held:
        rank, left = 1, 0
        for c in candidates - {q, p}:
            known = (q, c) in pairs or (c, q) in pairs
            if known or guide[q] @ guide[c] > guide[q] @ guide[p]:
                continue
            left += 1
            rank += student[q] @ student[c] >= student[q] @ student[p] - 1e-6
        found.append((int(rank), left))
    return found


@pytest.mark.parametrize("tiles", [(1024, 4096), (7, 13)])
def test_ranks_are_those_of_a_naive_reference(
    shards: Shards, tiny_model: Path, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(validation, "_TILE_ROWS", tiles[0])
    monkeypatch.setattr(validation, "_TILE_CANDIDATES", tiles[1])
    encoder = Encoder.load(tiny_model)  # random weights: every rank occurs
    rows = np.flatnonzero(np.arange(len(shards.triplets)) % 4 != 3)
    found = score(encoder, shards, rows, batch_tokens=512)
    expected = naive_ranks(encoder, shards, rows)
    assert list(zip(found.ranks.tolist(), found.candidates.tolist(), strict=True)) == expected
    everything = (
        len(np.unique(np.concatenate([shards.triplets.positive[rows], shards.triplets.negatives_of(rows)]))) - 1
    )
    assert (
        found.candidates.min() < everything and found.ranks.max() > 20
    )  # something was hidden, and not all ranked 1st
    np.testing.assert_array_equal(found.task, shards.triplets.task[rows])


def test_the_guide_as_a_student_is_perfect(shards: Shards, minilm: Path):
    found = score(Encoder.load(minilm), shards, held_out_rows(shards.triplets, 20, seed=1))
    assert found.ndcg_at_10 > 0.99 and np.median(found.candidates) > 20


def noised(model: Path, noise: float) -> Encoder:
    """A student of known quality: its weights plus `noise` times their own spread."""
    torch.manual_seed(0)
    encoder = Encoder.load(model, max_tokens=32)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            if parameter.ndim == 2:
                parameter += noise * parameter.std() * torch.randn_like(parameter)
    return encoder


def write_checkpoint(encoder: Encoder, folder: Path, step: int) -> None:
    """What one worker of a run writes, without Adam's moments."""
    weights = {f"weight/0/{name}": p.detach().flatten() for name, p in encoder.model.named_parameters()}
    Snapshot(weights, {"step": step, "adam_step": step}, part=0, parts=1).write(folder)


@pytest.mark.slow
def test_ray_train_finds_the_best_checkpoint(recipe: Recipe, shards: Shards, minilm: Path, tmp_path: Path):
    """The second of four checkpoints is the best, the third cannot be scored, only one is kept."""
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    (recipe.run_dir() / VALIDATIONS).unlink(missing_ok=True)
    for number, noise in enumerate((0.6, 0.0, None, 0.3), start=1):
        write_checkpoint(noised(minilm, noise or 0.0), tmp_path / f"step-{number}", number)
        if noise is None:
            next((tmp_path / f"step-{number}").glob("*.safetensors")).unlink()

    def loop(settings: dict[str, Any]) -> None:
        import ray.train
        import torch.distributed

        assert torch.distributed.get_world_size() == 2
        for number in range(1, 5):
            checkpoint = ray.train.Checkpoint.from_directory(f"{settings['folder']}/step-{number}")
            checkpoint = checkpoint if ray.train.get_context().get_world_rank() == 0 else None
            task = ray.train.ValidationTaskConfig(fn_kwargs={"step": number}) if checkpoint else False
            ray.train.report({"step": number, "score": settings["unscored"]}, checkpoint=checkpoint, validation=task)

    trainer = TorchTrainer(
        loop,
        train_loop_config={"folder": str(tmp_path), "unscored": UNSCORED},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="best",
            storage_path=str(tmp_path / "storage"),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE),
        ),
        validation_config=ray_validation(recipe, shards.directory),
    )
    result = trainer.fit()
    checkpoint, metrics = best_checkpoint(result)
    assert metrics["step"] == 2 and metrics["score"] > 0.99
    steps = [progress_of(kept.path)["step"] for kept in (checkpoint, result.checkpoint)]
    assert steps == [2, 4]  # the last one is to resume from
    assert len(list((tmp_path / "storage" / "best").glob("checkpoint_*/"))) == 2
    lines = read_metrics(recipe.run_dir() / VALIDATIONS)
    assert [(line["step"], line["event"]) for line in lines] == [(n, "validation") for n in (1, 2, 4)]
    assert lines[1]["score"] == metrics["score"] > lines[2]["score"] > lines[0]["score"]
    assert {"score/book-0", "score/book-1", "mrr", "accuracy_at_1"} < set(lines[0])
    assert lines[0]["validation_rows"] == 40


def test_development_tasks_are_scored_as_evaluate_does(tiny_model: Path, tmp_path: Path):
    from gist_ray.encoder import Encoder
    from tests.evaluation.test_evaluate import sequential
    from tests.evaluation.tiny_tasks import write_tiny_tasks

    write_tiny_tasks(tmp_path / "all")
    for name in ("SciFact", "TinySTS"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "all" / name).rename(tmp_path / "data" / name)
    found = task_metrics(Encoder.load(tiny_model), tmp_path / "data")
    expected = sequential(tiny_model, local_tasks(tmp_path / "data"))
    assert {name: found[f"score/{name}"] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert found["score"] == pytest.approx(sum(expected.values()) / 2) and len(found) == 3


def test_a_validation_whose_process_dies_is_done_again_and_then_given_up(
    recipe: Recipe, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ray.train import Checkpoint

    def dies(times: int) -> Any:
        def score_checkpoint(checkpoint: Any, step: int, recipe: dict[str, Any], shards: str) -> dict[str, float]:
            deaths = len(list(tmp_path.glob("death-*")))
            if deaths < times:
                (tmp_path / f"death-{deaths}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {"score": 0.5}

        return score_checkpoint

    arguments = {"step": 3, "recipe": recipe.model_dump(mode="json"), "shards": str(shards.directory)}
    checkpoint = Checkpoint.from_directory(str(tmp_path))
    monkeypatch.setattr(validation, "score_checkpoint", dies(1))
    assert validate_checkpoint(checkpoint, **arguments) == {"score": 0.5}
    assert len(list(tmp_path.glob("death-*"))) == 1
    monkeypatch.setattr(validation, "score_checkpoint", dies(9))
    with pytest.raises(RuntimeError, match="2 processes died while they scored"):
        validate_checkpoint(checkpoint, **arguments)
    assert len(list(tmp_path.glob("death-*"))) == 3


def test_the_best_checkpoint_is_the_later_of_equals_and_else_the_last(caplog: pytest.LogCaptureFixture):
    kept = [("a", {"score": UNSCORED}), ("b", {}), ("c", {"score": 0.0}), ("d", {"score": 0.0})]
    last = {"step": 9, "score": UNSCORED}
    assert best_checkpoint(SimpleNamespace(best_checkpoints=kept, checkpoint="z", metrics=last)) == kept[3]
    assert best_checkpoint(SimpleNamespace(best_checkpoints=kept[:2], checkpoint="z", metrics=last)) == (
        "z",
        {"step": 9},
    )
    assert "no checkpoint was scored" in caplog.text
