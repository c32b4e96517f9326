"""N workers, any memory, any ZeRO stage: one and the same step. Real process groups, real shards, real DeepSpeed."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards
from gist_ray.data.texts import unit_rows
from gist_ray.encoder import Encoder
from gist_ray.recipe_file import parse_recipe
from gist_ray.training.batch import WorkerBatch, make_batch
from gist_ray.training.checkpoint import owned_slices
from gist_ray.training.engine import make_engine, set_learning_rate
from gist_ray.training.memory import ActivationMemory
from gist_ray.training.phases import PHASES, PhaseClock
from gist_ray.training.step import Stepper, StepSums, seed_chunk
from gist_ray.training.student import load_student
from tests.training.workers import on_workers

BATCH = np.arange(10, 33)  # 23 rows: does not divide by 2 or 3
EVERYTHING, NOTHING = ActivationMemory(1e15, 0, 1, 1), ActivationMemory(0, 0, 1, 1)


def recipe_for(folder: Path, student: Path, rows: list[dict[str, Any]], **train: Any) -> Recipe:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_recipe(
        {
            "name": "run",
            "output_dir": str(folder),
            "data": {"sources": [{"path": str(folder / "a.jsonl")}]},
            "student": {"path": str(student)},
            "guide": {"path": str(student)},
            "train": {"batch_size": 23, "chunk_tokens": 256, **train},
            "loss": {"temperature": 0.05},
        }
    )


def with_train(recipe: Recipe, **train: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, verse_rows, tmp_path_factory: pytest.TempPathFactory, ray_session) -> Recipe:
    made = recipe_for(tmp_path_factory.mktemp("step"), tiny_model, verse_rows[:130])
    prepare(made)
    return made


@pytest.fixture(scope="module")
def real_recipe(minilm: Path, verse_rows, tmp_path_factory: pytest.TempPathFactory, ray_session) -> Recipe:
    made = recipe_for(tmp_path_factory.mktemp("real"), minilm, verse_rows[:40], dropout=0.0)
    prepare(made)
    return made


class PlainEngine:
    """What the step asks of DeepSpeed, in plain torch: for gradients in float64, which DeepSpeed does not keep."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.module = model

    def zero_optimization_stage(self) -> int:
        return 0

    @contextmanager
    def no_sync(self):
        yield

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def allreduce_gradients(self) -> None:
        for parameter in self.module.parameters():
            if parameter.requires_grad and dist.get_world_size() > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def step(self) -> None:
        """Leave the weights: the gradient is what is looked at."""


def stepper_for(recipe: Recipe, encoder: Encoder, engine: Any, rank: int, memory=EVERYTHING) -> Stepper:
    return Stepper(encoder, engine, recipe.loss, recipe.train, memory, PhaseClock(), rank)


def gradients(rank: int, world_size: int, recipe: Recipe, batch: np.ndarray, cases: list[dict]) -> list[Any]:
    """(loss, share hidden, gradient of all parameters) of one global batch in each case."""
    found = []
    for case in cases:
        encoder = load_student(with_train(recipe, **case.get("train", {})), "cpu")
        encoder.model.to(case.get("dtype", torch.float64))
        shards = Shards.open(recipe.shards_dir())
        case_recipe = with_train(recipe, **case.get("train", {}))
        part = make_batch(encoder, shards, batch, case_recipe, rank, world_size)
        if "guide" in case:
            part = replace(part, guide=case["guide"](shards, part))
        memory = case.get("memory", EVERYTHING)
        sums = stepper_for(case_recipe, encoder, PlainEngine(encoder.model), rank, memory).step(0, part)
        flat = torch.cat([p.grad.flatten() for p in encoder.model.parameters() if p.requires_grad])
        found.append((sums, flat.double().numpy()))
    return found


def over_workers(results: list[list[tuple[StepSums, np.ndarray]]], case: int = 0) -> tuple[float, float, np.ndarray]:
    sums = [worker[case][0] for worker in results]
    return sum(s.loss for s in sums), sum(s.hidden for s in sums), results[0][case][1]


def assert_same(one: tuple[float, float, np.ndarray], other: tuple[float, float, np.ndarray], tolerance: float) -> None:
    assert np.linalg.norm(one[2]) > 1e-3  # not vacuous
    assert other[0] == pytest.approx(one[0], rel=tolerance)
    assert other[1] == one[1] > 0  # the masks are identical
    assert np.linalg.norm(other[2] - one[2]) <= tolerance * np.linalg.norm(one[2])


def live_guide(shards: Shards, part: WorkerBatch) -> torch.Tensor:
    """The guide run on the batch's raw texts, as the trainers without a table do at every step."""
    guide = Encoder.load(json.loads((shards.directory.parent / "guide.json").read_text()))
    vectors = guide.encode(shards.texts.texts(part.texts.numpy()))
    return torch.from_numpy(unit_rows(vectors.astype(np.float16).astype(np.float32)))  # as a table keeps them


SMALL_CASES = [
    {},
    {"memory": NOTHING},
    {"memory": ActivationMemory(500, 0, 1, 0)},  # some chunks are kept, some are not
    {"train": {"chunk_tokens": 16}},
    {"train": {"chunk_tokens": 100_000}},
]
LIVELY_CASES = [{"train": {"chunk_tokens": 64, "dropout": 0.3}}, {"train": {"chunk_tokens": 64}}]


def test_workers_memory_chunks_and_dropout_change_nothing(recipe: Recipe):
    quiet = with_train(recipe, dropout=0.0)
    runs = {
        n: on_workers(n, gradients, quiet, BATCH, LIVELY_CASES + (SMALL_CASES if n < 3 else [{}])) for n in (1, 2, 3)
    }
    expected = over_workers(runs[1], 2)
    for results in runs.values():
        # A chunk draws dropout of its own, whoever computes it.
        assert_same(over_workers(runs[1]), over_workers(results), 1e-9)
        for case in range(1, len(results[0])):
            assert_same(expected, over_workers(results, case), 1e-9)
    assert abs(over_workers(runs[1])[0] - expected[0]) > 1e-3 * expected[0]
    recomputed = [runs[1][0][case][0].recomputed_tokens for case in (2, 3, 4)]
    assert recomputed[0] == 0 < recomputed[2] < recomputed[1] == runs[1][0][3][0].padded_tokens


def test_labels_hide_candidates_on_any_number_of_workers(recipe: Recipe, verse_rows, tmp_path: Path):
    """Shards of the same rows, of which two of three say a label, of two."""
    rows = [row | ({"query_label": i % 2} if i % 3 else {}) for i, row in enumerate(verse_rows[:130])]
    labelled = recipe_for(tmp_path, Path(recipe.student.path), rows)
    prepare(labelled)
    runs = {n: over_workers(on_workers(n, gradients, labelled, BATCH, LIVELY_CASES)) for n in (1, 2)}
    assert_same(runs[1], runs[2], 1e-9)
    plain = over_workers(on_workers(1, gradients, recipe, BATCH, LIVELY_CASES))

    def with_loss(**changes: bool) -> Recipe:
        return labelled.model_copy(update={"loss": labelled.loss.model_copy(update=changes)})

    deaf = with_loss(hide_same_label=False)
    assert_same(plain, over_workers(on_workers(1, gradients, deaf, BATCH, LIVELY_CASES)), 1e-12)
    assert runs[1][0] < 0.95 * plain[0]
    shown = with_loss(hide_same_label=False, show_other_labels=True)
    runs = {n: over_workers(on_workers(n, gradients, shown, BATCH, LIVELY_CASES)) for n in (1, 2)}
    assert_same(runs[1], runs[2], 1e-9)
    assert runs[1][0] > plain[0]


def test_own_negatives_are_shown_on_any_number_of_workers(recipe: Recipe):
    """Of rows of which the guide would hide everything."""

    def with_loss(**changes: Any) -> Recipe:
        return recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"margin": 1.0, **changes})})

    hidden = over_workers(on_workers(1, gradients, with_loss(), BATCH, LIVELY_CASES))
    shown = with_loss(show_own_negatives=True)
    runs = {n: over_workers(on_workers(n, gradients, shown, BATCH, LIVELY_CASES)) for n in (1, 2)}
    assert_same(runs[1], runs[2], 1e-9)
    assert hidden[0] == 0 < runs[1][0]


def test_a_student_without_layers(recipe: Recipe):
    static = recipe.model_copy(update={"student": recipe.student.model_copy(update={"layers": ()})})
    runs = {n: over_workers(on_workers(n, gradients, static, BATCH, LIVELY_CASES)) for n in (1, 2)}
    assert_same(runs[1], runs[2], 1e-9)


def test_fewer_rows_than_workers(recipe: Recipe):
    quiet = with_train(recipe, dropout=0.0)
    one, three = (on_workers(n, gradients, quiet, BATCH[:2], [{}]) for n in (1, 3))
    assert over_workers(three)[0] == pytest.approx(over_workers(one)[0], rel=1e-9)
    np.testing.assert_allclose(over_workers(three)[2], over_workers(one)[2], atol=1e-9)


@pytest.mark.slow
def test_a_real_model_in_fp32_and_a_live_guide(real_recipe: Recipe):
    (real_recipe.run_dir() / "guide.json").write_text(json.dumps(real_recipe.guide.path))
    cases = [{"dtype": torch.float32, **case} for case in ({}, {"memory": NOTHING}, {"guide": live_guide})]
    runs = {n: on_workers(n, gradients, real_recipe, np.arange(24), cases[: 4 - n]) for n in (1, 2, 3)}
    for results in runs.values():
        for case in range(len(results[0])):
            assert_same(over_workers(runs[1]), over_workers(results, case), 1e-4)


def count_reductions(sizes: list[int]) -> None:
    """Have the sizes of what is added up over workers put into a list; before DeepSpeed is imported, for good."""
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
        setattr(dist, name, _counting(getattr(dist, name), sizes))


def _counting(function: Callable[..., Any], sizes: list[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
        sizes.append(max(tensor.numel() for tensor in tensors))
        return function(*arguments, **options)

    return call


def trained(rank: int, world_size: int, recipe: Recipe, stages: list[int], batches: list[np.ndarray]) -> dict[Any, Any]:
    """Weights after some steps, and gradient reductions of each step, by (stage, memory)."""
    found, sizes = {}, []
    count_reductions(sizes)
    for stage in stages:
        for name, memory in (("kept", EVERYTHING), ("recomputed", NOTHING)):
            case = with_train(recipe, zero_stage=stage)
            encoder = load_student(case, "cpu")
            engine = make_engine(encoder.model, case.train, world_size)
            encoder.model = engine.module
            numel = sum(p.ds_numel if stage == 3 else p.numel() for p in encoder.model.parameters() if p.requires_grad)
            stepper, shards = stepper_for(case, encoder, engine, rank, memory), Shards.open(recipe.shards_dir())
            reductions, losses = [], []
            for step, batch in enumerate(batches):
                set_learning_rate(engine, 1e-3)
                sizes.clear()
                sums = stepper.step(step, make_batch(encoder, shards, batch, case, rank, world_size))
                losses.append((sums.loss, sums.grad_norm))
                reductions.append(sum(size >= 0.9 * numel for size in sizes))
            weights = {(s.name, s.start): s.weight.clone() for s in owned_slices(engine)}
            phases = dict(zip(PHASES, stepper.clock.read(), strict=True))
            found[stage, name] = weights, reductions, losses, phases
            engine.destroy()
    return found


def assembled(results: list[dict[Any, Any]], case: Any) -> dict[str, torch.Tensor]:
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for worker in results:
        for (name, start), weight in worker[case][0].items():
            pieces.setdefault(name, {})[start] = weight
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


def test_every_zero_stage_ends_with_the_same_weights(recipe: Recipe):
    batches = [np.arange(23 * i, 23 * i + 23) for i in range(5)]
    quiet = with_train(recipe, dropout=0.0)
    expected: dict[str, torch.Tensor] = {}
    norms: list[float] = []
    for world_size in (1, 2):
        results = on_workers(world_size, trained, quiet, [0, 1, 2, 3], batches)
        for case in results[0]:
            weights = assembled(results, case)
            expected = expected or weights
            assert weights.keys() == expected.keys()
            for name, weight in weights.items():
                # Adam moves each weight by up to 1e-3 a step, whatever the size of its gradient.
                torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-5)
            alone = world_size == 1 and case[0] < 3  # nothing to reduce, and no stage to divide anything
            assert results[0][case][1] == [0 if alone else 1] * len(batches), case
            norms = norms or [norm for _, norm in results[0][case][2]]
            assert [norm for _, norm in results[0][case][2]] == pytest.approx(norms, rel=1e-3)
            assert results[0][case][3]["reduce"] > 0
        start = dict(load_student(quiet, "cpu").model.named_parameters())
        # A bias of keys moves no attention: its gradient is 0.
        names = [name for name in weights if not name.endswith("key.bias")]
        moved = [float((weights[name] - start[name].detach().flatten()).abs().max()) for name in names]
        assert min(moved) > 1e-3  # every parameter was trained


def test_recomputed_activations_have_the_same_dropout(recipe: Recipe):
    """Bit for bit: how much memory there is decides nothing."""
    batches = [np.arange(23 * i, 23 * i + 23) for i in range(2)] + [np.arange(2)]  # the last: an idle worker
    lively = with_train(recipe, dropout=0.3)
    results = on_workers(3, trained, lively, [0, 1, 3], batches)
    for stage in (0, 1, 3):
        kept, recomputed = (assembled(results, (stage, memory)) for memory in ("kept", "recomputed"))
        assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
        assert results[0][stage, "kept"][2] == results[0][stage, "recomputed"][2]


def test_dropout_is_a_function_of_seed_step_and_chunk():
    def drawn(*key: int) -> torch.Tensor:
        seed_chunk(*key)
        return torch.rand(4)

    assert torch.equal(drawn(1, 2, 3), drawn(1, 2, 3))
    keys = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]
    assert len({tuple(drawn(*key).tolist()) for key in keys}) == 4
