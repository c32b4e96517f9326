"""The stream of batches, what is measured of a step, and when a checkpoint is due."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards
from gist_ray.training.loop import Preemption, Rates, batches_from, count_steps, global_metrics, planner_for
from gist_ray.training.phases import PhaseClock
from gist_ray.training.step import StepSums
from tests.training.test_step import recipe_for
from tests.training.workers import on_workers


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, verse_rows, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return recipe_for(tmp_path_factory.mktemp("loop"), tiny_model, verse_rows[:80], batch_size=16, epochs=2)


@pytest.fixture(scope="module")
def shards(recipe: Recipe, ray_session) -> Path:
    return prepare(recipe)


def test_the_stream_of_batches_can_be_entered_anywhere(shards: Path, recipe: Recipe):
    opened = Shards.open(shards)
    epoch_steps = count_steps(planner_for(opened, recipe), recipe.train.epochs)
    whole = list(batches_from(opened, recipe, epoch_steps, 0))
    assert len(epoch_steps) == 2 and [step for step, _, _ in whole] == list(range(sum(epoch_steps)))
    assert [epoch for _, epoch, _ in whole] == [0] * epoch_steps[0] + [1] * epoch_steps[1]
    for start in (1, epoch_steps[0] - 1, epoch_steps[0], epoch_steps[0] + 1, len(whole) - 1, len(whole)):
        rest = list(batches_from(opened, recipe, epoch_steps, start))
        assert len(rest) == len(whole) - start
        for (step, epoch, batch), (expected_step, expected_epoch, expected) in zip(rest, whole[start:], strict=True):
            assert (step, epoch) == (expected_step, expected_epoch) and np.array_equal(batch, expected)


def test_held_out_rows_are_not_trained_on(shards: Path, recipe: Recipe):
    opened = Shards.open(shards)
    held = recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"rows": 10})})
    steps = count_steps(planner_for(opened, held), held.train.epochs)
    shown = np.concatenate([rows for _, _, rows in batches_from(opened, held, steps, 0)])
    assert len(np.unique(shown)) <= len(opened.triplets) - 10
    assert len(shown) == 2 * len(np.unique(shown))  # two epochs


def _metrics(rank: int, world_size: int) -> dict:
    clock, rates = PhaseClock(), Rates(10)
    with clock("forward"):
        time.sleep(0.02 * (rank + 1))
    sums = StepSums(
        loss=1.0 + rank, hidden=1, candidates=4, tokens=90, padded_tokens=100, grad_norm=1, recomputed_tokens=50 * rank
    )
    return global_metrics(sums, clock, 6, rates)


def test_metrics_are_those_of_the_global_batch():
    first, second = on_workers(2, _metrics)
    assert first == second | {"seconds": first["seconds"]}  # rank 0's clock is everyone's
    assert first["loss"] == 0.5 and first["masked_share"] == 0.25 and first["workers"] == 2
    assert first["padding_share"] == pytest.approx(0.1) and first["recomputed_share"] == 0.25
    assert first["tokens_per_s"] == pytest.approx(180 / first["seconds"])
    assert first["examples_per_s"] == pytest.approx(6 / first["seconds"])
    forward = first["phases"]["forward"]
    assert 0.02 <= forward[0] < forward[1] and first["phases"]["loss"] == [0, 0]


def test_a_clock_counts_each_phase_and_starts_again():
    clock = PhaseClock()
    with clock("data"):
        time.sleep(0.01)
    with pytest.raises(ValueError, match="x"), clock("loss"):
        raise ValueError("x")
    with clock("data"):
        time.sleep(0.01)
    data, *_ = clock.read()
    assert 0.02 <= data < 0.2 and sum(clock.read()) == 0


def test_what_is_left_is_estimated():
    rates = Rates(10)
    time.sleep(0.02)
    seconds = rates.seconds()
    assert 0.02 <= seconds < 0.2 and rates.eta_s(4) == pytest.approx(6 * seconds) and rates.eta_s(10) == 0


def test_a_checkpoint_is_due_once_when_a_node_is_about_to_go(monkeypatch: pytest.MonkeyPatch):
    import ray.train

    asked, answers = [], iter([None, SimpleNamespace(deadline_ms=1)])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: asked.append(1) or next(answers))
    preemption = Preemption()
    clock = [100.0, 100.5, 101.9, 102.0, 103.0, 110.0]
    assert [preemption.is_near(second) for second in clock] == [False, False, False, True, False, False]
    assert len(asked) == 2  # at 100 and 102: it is a barrier
