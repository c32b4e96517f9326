"""What one set of workers saves, any other set goes on from; what is damaged is told from what is whole."""

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.data.shards import Shards
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.training.batch import make_batch
from gist_ray.training.checkpoint import (
    SavedState,
    Snapshot,
    owned_slices,
    progress_of,
    restore,
    trained_student,
)
from gist_ray.training.engine import make_engine, set_learning_rate
from gist_ray.training.student import load_student
from tests.training.test_step import recipe_for, stepper_for, with_train
from tests.training.workers import on_workers

BATCHES = [np.arange(20 * i, 20 * i + 20) for i in range(4)]


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, verse_rows, tmp_path_factory: pytest.TempPathFactory, ray_session) -> Recipe:
    made = recipe_for(tmp_path_factory.mktemp("checkpoint"), tiny_model, verse_rows[:100], dropout=0.1)
    prepare(made)
    return made


def run(rank: int, world_size: int, recipe: Recipe, legs: list[dict[str, Any]]) -> list[Any]:
    """Legs of training, each on an engine of its own: ZeRO stage, steps, folder to start from, folder to save to."""
    found = []
    for leg in legs:
        case = with_train(recipe, zero_stage=leg["stage"])
        encoder = load_student(case, "cpu")
        engine = make_engine(encoder.model, case.train, world_size)
        encoder.model = engine.module
        if leg.get("load"):
            assert restore(engine, Path(leg["load"])) == {
                "step": leg["steps"][0],
                "adam_step": leg["steps"][0],
                "parts": leg["parts"],
            }
        stepper, shards = stepper_for(case, encoder, engine, rank), Shards.open(recipe.shards_dir())
        losses = []
        for step in range(*leg["steps"]):
            set_learning_rate(engine, 1e-3)
            losses.append(stepper.step(step, make_batch(encoder, shards, BATCHES[step], case, rank, world_size)).loss)
        if leg.get("save"):
            before = Snapshot.take(engine, {"step": 0}, rank, world_size)
            addresses = {name: tensor.data_ptr() for name, tensor in before.tensors.items()}
            for tensor in before.tensors.values():
                tensor.fill_(7)
            snapshot = Snapshot.take(engine, {"step": leg["steps"][1]}, rank, world_size, into=before)
            assert {name: tensor.data_ptr() for name, tensor in snapshot.tensors.items()} == addresses
            stepper.step(9, make_batch(encoder, shards, BATCHES[0], case, rank, world_size))  # must not reach it
            snapshot.write(Path(leg["save"]))
        found.append((losses, {(s.name, s.start): s.weight.clone() for s in owned_slices(engine)}))
        engine.destroy()
    return found


def weights_of(results: list[list[Any]], leg: int) -> dict[str, torch.Tensor]:
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for worker in results:
        for (name, start), weight in worker[leg][1].items():
            pieces.setdefault(name, {})[start] = weight
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


@pytest.fixture(scope="module")
def saved(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """Checkpoints of ZeRO 0 to 3 on two workers at step 2, and the undisturbed runs to step 4."""
    folder = tmp_path_factory.mktemp("saved")
    # Stage by stage: ZeRO 3 replaces torch's linear layer in the whole process, and rounds otherwise.
    legs = [
        {"stage": stage, **leg}
        for stage in range(4)
        for leg in ({"steps": (0, 2), "save": str(folder / f"zero{stage}")}, {"steps": (0, 4)})
    ]
    return folder, on_workers(2, run, recipe, legs)


def test_the_same_workers_go_on_bit_for_bit(recipe: Recipe, saved):
    folder, before = saved
    legs = [{"stage": s, "steps": (2, 4), "load": str(folder / f"zero{s}"), "parts": 2} for s in range(4)]
    after = on_workers(2, run, recipe, legs)
    for stage in range(4):
        for rank in range(2):
            assert after[rank][stage][0] == before[rank][2 * stage + 1][0][2:], stage
        expected, found = weights_of(before, 2 * stage + 1), weights_of(after, stage)
        assert all(torch.equal(found[name], expected[name]) for name in expected), stage


@pytest.mark.slow
def test_other_workers_and_another_stage_go_on_to_rounding(recipe: Recipe, tmp_path: Path):
    """2 -> 1 -> 3 workers, from any stage to any other. Dropout differs between workers, so without it."""
    quiet = with_train(recipe, dropout=0.0)
    straight = on_workers(1, run, quiet, [{"stage": 0, "steps": (0, 4)}])
    legs = [{"stage": s, "steps": (0, 2), "save": str(tmp_path / f"two{s}")} for s in (1, 3)]
    on_workers(2, run, quiet, legs)
    legs = [
        {"stage": b, "steps": (2, 3), "load": str(tmp_path / f"two{a}"), "parts": 2, "save": str(tmp_path / f"one{b}")}
        for a, b in ((1, 0), (3, 2))
    ]
    on_workers(1, run, quiet, legs)
    legs = [{"stage": b, "steps": (3, 4), "load": str(tmp_path / f"one{a}"), "parts": 1} for a, b in ((0, 3), (2, 1))]
    three = on_workers(3, run, quiet, legs)
    expected = weights_of(straight, 0)
    for leg in range(2):
        found = weights_of(three, leg)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5)


def test_every_element_is_saved_once(recipe: Recipe, saved):
    folder, _ = saved
    for stage in range(4):
        state = SavedState(folder / f"zero{stage}")
        parameters = {n: p for n, p in load_student(recipe, "cpu").model.named_parameters() if p.requires_grad}
        assert state.names() == set(parameters)
        for name, parameter in parameters.items():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                values = state.read(kind, name, 0, parameter.numel())
                assert not values.isnan().any()
                part = state.read(kind, name, 3, 7) if parameter.numel() > 10 else values[3:10]
                assert torch.equal(part, values[3:10])
        total = sum(p.numel() for p in parameters.values())
        sizes = [file.stat().st_size for file in (folder / f"zero{stage}").glob("state-*")]
        assert len(sizes) == 2 and 12 * total <= sum(sizes) < 12.5 * total  # no element twice
        assert max(sizes) < 0.75 * sum(sizes)  # and the work is shared


def test_the_student_of_a_checkpoint(recipe: Recipe, saved, tmp_path: Path):
    folder, _ = saved
    student = trained_student(recipe, folder / "zero1")
    state = SavedState(folder / "zero1")
    weights = dict(student.model.named_parameters())
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(weights[name].flatten(), state.read("weight", name, 0, weights[name].numel()))
    student.save(tmp_path / "student")
    again = Encoder.load(tmp_path / "student").encode(["a b c"])
    np.testing.assert_array_equal(student.encode(["a b c"]), again)


def test_the_start_is_mixed_into_the_student_of_a_checkpoint(recipe: Recipe, saved, tmp_path: Path):
    folder, _ = saved
    trained = dict(trained_student(recipe, folder / "zero1").model.named_parameters())
    start = dict(load_student(recipe, "cpu", training=False).model.named_parameters())
    mixed = trained_student(with_train(recipe, start_share=0.25), folder / "zero1").model
    moved = 0
    for name, parameter in mixed.named_parameters():
        wanted = 0.25 * start[name].double() + 0.75 * trained[name].double()
        torch.testing.assert_close(parameter.double(), wanted, rtol=0, atol=1e-6)
        moved += int((trained[name] - start[name]).abs().max() > 1e-4)
    assert moved > 20  # or the formula says nothing


def damaged(folder: Path, tmp_path: Path, damage: Any) -> Path:
    copy = tmp_path / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    damage(copy)
    return copy


def test_a_damaged_checkpoint_is_not_whole(recipe: Recipe, saved, tmp_path: Path):
    folder = saved[0] / "zero1"
    assert progress_of(str(folder)) == {"step": 2, "adam_step": 2, "parts": 2}

    def cut_short(copy: Path) -> None:
        state = copy / "state-00001-of-00002.safetensors"
        state.write_bytes(state.read_bytes()[:-1])

    damages = [
        cut_short,
        lambda copy: (copy / "state-00000-of-00002.safetensors").unlink(),
        lambda copy: (copy / "part-00001-of-00002.json").unlink(),
        lambda copy: (copy / "part-00000-of-00002.json").write_text('{"files": {'),
        lambda copy: shutil.rmtree(copy),
    ]
    for damage in damages:
        broken = damaged(folder, tmp_path, damage)
        assert progress_of(str(broken)) is None
        with pytest.raises(InputError, match="not a whole checkpoint"):
            SavedState(broken)


def test_a_checkpoint_of_another_model_is_refused(recipe: Recipe, saved, minilm: Path):
    other = recipe.model_copy(update={"student": recipe.student.model_copy(update={"layers": (0,)})})
    with pytest.raises(InputError, match="of another model"):
        trained_student(other, saved[0] / "zero1")


def test_a_part_that_cannot_be_written_is_not_whole(tmp_path: Path):
    """The kernel refuses to let the file grow, as it does on a full disk."""
    snapshot = Snapshot({"weight/0/a": torch.zeros(10_000)}, {"step": 1}, 0, 1)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written: .*File too large.*the one before is whole"):
            snapshot.write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert progress_of(str(tmp_path)) is None and list(tmp_path.iterdir()) == []
    snapshot.write(tmp_path)
    assert progress_of(str(tmp_path)) == {"step": 1, "parts": 1}
