"""N workers compute the loss and the gradients of one: real process groups, real shards, a real (tiny) model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards
from gist_ray.encoder import Encoder
from gist_ray.recipe_file import parse_recipe
from gist_ray.training.loop import (
    batch_loss,
    batches_from,
    count_steps,
    seed_step,
    set_dropout,
    totals,
)

BATCH = np.arange(10, 33)  # 23 rows: does not divide by 2 or 3


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, verse_rows, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    import json

    folder = tmp_path_factory.mktemp("loop")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in verse_rows[:80]))
    return parse_recipe(
        {
            "name": "run",
            "output_dir": str(folder),
            "data": {"sources": [{"path": str(folder / "a.jsonl")}]},
            "student": {"path": str(tiny_model)},
            "guide": {"path": str(tiny_model)},
            "train": {"batch_size": 16, "epochs": 2},
            "loss": {"temperature": 0.05},
        }
    )


@pytest.fixture(scope="module")
def shards(recipe: Recipe, ray_session) -> Path:
    return prepare(recipe)


def _gradients(rank: int, world_size: int, folder: str, recipe: Recipe, batch: np.ndarray, results: Any) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        store = f"file://{folder}/store-{world_size}-{len(batch)}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    encoder = Encoder.load(recipe.student.path)
    encoder.model.double()
    loss, sums = batch_loss(encoder, Shards.open(recipe.shards_dir()), batch, recipe, rank, world_size)
    loss.backward()
    # As DeepSpeed does: the mean over the workers.
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in encoder.model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    if world_size > 1:
        dist.all_reduce(flat)
    if rank == 0 or world_size == 1:
        results.append((totals(sums, len(batch)), (flat / world_size).numpy()))
    elif world_size > 1:
        totals(sums, len(batch))
    if world_size > 1:
        dist.destroy_process_group()


def gradients_on(world_size: int, recipe: Recipe, folder: Path, batch: np.ndarray = BATCH) -> tuple[dict, np.ndarray]:
    if world_size == 1:
        results: list[Any] = []
        _gradients(0, 1, str(folder), recipe, batch, results)
        return results[0]
    with mp.Manager() as manager:
        shared = manager.list()
        mp.spawn(_gradients, (world_size, str(folder), recipe, batch, shared), nprocs=world_size)
        return shared[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_n_workers_equal_one(shards: Path, recipe: Recipe, tmp_path: Path, world_size: int):
    one, one_gradient = gradients_on(1, recipe, tmp_path)
    many, many_gradient = gradients_on(world_size, recipe, tmp_path)
    assert np.abs(one_gradient).max() > 1e-3  # not vacuous
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-9)
    assert many["masked_share"] == one["masked_share"] > 0
    scale = np.linalg.norm(one_gradient)
    assert np.linalg.norm(many_gradient - one_gradient) <= 1e-9 * scale


def test_fewer_rows_than_workers(shards: Path, recipe: Recipe, tmp_path: Path):
    one, one_gradient = gradients_on(1, recipe, tmp_path, BATCH[:2])
    three, three_gradient = gradients_on(3, recipe, tmp_path, BATCH[:2])
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-9)
    np.testing.assert_allclose(three_gradient, one_gradient, atol=1e-9 * np.linalg.norm(one_gradient))


def test_the_stream_of_batches_can_be_entered_anywhere(shards: Path, recipe: Recipe):
    opened = Shards.open(shards)
    epoch_steps = count_steps(opened, recipe)
    whole = list(batches_from(opened, recipe, epoch_steps, 0))
    assert len(epoch_steps) == 2 and [step for step, _ in whole] == list(range(sum(epoch_steps)))
    for start in (1, epoch_steps[0] - 1, epoch_steps[0], epoch_steps[0] + 1, len(whole) - 1, len(whole)):
        rest = list(batches_from(opened, recipe, epoch_steps, start))
        assert len(rest) == len(whole) - start
        for (step, batch), (expected_step, expected) in zip(rest, whole[start:], strict=True):
            assert step == expected_step and np.array_equal(batch, expected)


def test_dropout_is_a_function_of_seed_step_and_worker():
    def drawn(*key: int) -> torch.Tensor:
        seed_step(*key)
        return torch.rand(4)

    assert torch.equal(drawn(1, 2, 3), drawn(1, 2, 3))
    assert len({tuple(drawn(*key).tolist()) for key in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]}) == 4


def test_set_dropout(tiny_model: Path):
    model = Encoder.load(tiny_model).model
    set_dropout(model, 0.3)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    set_dropout(model, None)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
