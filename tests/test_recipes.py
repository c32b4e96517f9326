"""The recipes of the released models: what was published, and that each difference is explained where it stands."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gist_ray.cli import main
from gist_ray.config import Recipe
from gist_ray.recipe_file import RECIPES_DIR, load_recipe

ROWS = 1_821_864  # of the data set, at most
WARMUP, PEAK = 0.1, 5e-6  # of all released runs
# Of each released run: student, its pooling, batch, nominal epochs; step and learning rate of the released checkpoint.
RELEASED = {
    "gist-all-minilm": ("sentence-transformers/all-MiniLM-L6-v2", "mean", 16, 40, 102_000, 1.12e-6),
    "gist-bge-small": ("BAAI/bge-small-en-v1.5", "cls", 16, 40, 102_000, 1.12e-6),
    "gist-bge-base": ("BAAI/bge-base-en-v1.5", "cls", 32, 80, 103_500, 1.14e-6),
    "gist-bge-large": ("BAAI/bge-large-en-v1.5", "cls", 16, 40, 171_000, 1.88e-6),
}
every_recipe = pytest.mark.parametrize("name", RELEASED)


def theirs(name: str) -> dict[str, Any]:
    """The released run in the keys of our recipes."""
    student, pooling, batch_size, epochs, _, _ = RELEASED[name]
    return {
        "student.path": student,
        "student.pooling": pooling,
        "student.max_tokens": 512,
        "student.layers": None,
        "guide.path": "WhereIsAI/UAE-Large-V1",
        "guide.pooling": "mean",
        "guide.prompt": "",
        "data.instructions": [],
        "loss.temperature": 0.01,
        "loss.guide": "frozen",
        "loss.margin": 0.0,
        "loss.contrast_queries": True,
        "loss.contrast_positives": True,
        "loss.soft_label_weight": 0.0,
        "loss.matryoshka_dims": [],
        "train.batch_size": batch_size,
        "train.epochs": epochs,
        "train.learning_rate": PEAK,
        "train.warmup_ratio": WARMUP,
        "train.schedule": "linear",
        "train.weight_decay": 0.0,
        "train.max_grad_norm": 1.0,
        "train.length_window": 1,
        "train.task_temperature": 1.0,
        "train.dropout": None,
        "train.seed": 42,
        "train.precision": "bf16",
        "train.activation_checkpointing": True,
        "train.lora": None,
        "train.log_steps": 500,
        "train.checkpoint_steps": 500,
        "validation.rows": 0,
        "cluster.num_workers": 1,
        "cluster.gpus_per_worker": 1.0,
    }


DELIBERATE = {
    "train.epochs",
    "train.learning_rate",
    "train.warmup_ratio",
    "train.activation_checkpointing",
    "train.log_steps",
    "train.checkpoint_steps",
    "validation.rows",
}


def differing(recipe: Recipe, name: str) -> set[str]:
    tree = recipe.model_dump(mode="json")
    ours = {key: tree[key.split(".")[0]][key.split(".")[1]] for key in theirs(name)}
    return {key for key, value in theirs(name).items() if ours[key] != value}


def commented(text: str) -> set[str]:
    """Keys `section.key` with a comment on their line, or on the line above."""
    found, section, above = set(), "", ""
    for line in text.splitlines():
        if match := re.match(r"(\w+):", line):
            section = match[1]
        elif (match := re.match(r"  (\w+):", line)) and ("#" in line or above.lstrip().startswith("#")):
            found.add(f"{section}.{match[1]}")
        above = line
    return found


@every_recipe
def test_it_differs_from_the_released_run_where_it_says_so_and_nowhere_else(name: str):
    assert differing(load_recipe(name), name) == DELIBERATE
    text = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    assert DELIBERATE | {"guide.pooling"} <= commented(text)
    assert max(map(len, text.splitlines())) <= 120


@every_recipe
def test_the_learning_rate_follows_the_line_of_the_released_run(name: str):
    *_, batch_size, epochs, step, learning_rate = RELEASED[name]
    train = load_recipe(name).train
    nominal_steps, steps = epochs * ROWS / batch_size, round(train.epochs * ROWS / batch_size)
    slope = PEAK / (WARMUP * nominal_steps)
    assert train.warmup_steps(steps) == steps  # all of it is warm-up
    assert train.learning_rate / steps == pytest.approx(slope, rel=1e-4)
    assert train.learning_rate * step / steps == pytest.approx(learning_rate, rel=0.01)
    assert steps - ROWS / batch_size < step < steps  # their checkpoint falls into our last epoch
    assert step % train.checkpoint_steps == 0


@every_recipe
def test_data_and_models_are_pinned(name: str):
    recipe = load_recipe(name)
    (source,) = recipe.data.sources
    assert source.path == "hf://avsolatorio/medi-data-mteb_avs_triplets"
    assert source.revision == "238a0499b6e6b690cc64ea56fde8461daa8341bb"
    assert (source.tasks, source.max_rows, source.weight) == (None, None, 1.0)
    for model in (recipe.student, recipe.guide):
        assert model.revision and re.fullmatch(r"[0-9a-f]{40}", model.revision)
    assert recipe.name == name


def test_each_recipe_states_the_facts_of_its_own_model():
    """They share their words; the figures in them must not be another model's."""
    for name, (_, _, batch_size, epochs, step, learning_rate) in RELEASED.items():
        text = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
        prose = " ".join(text.replace("#", " ").split())
        warmup, seen = WARMUP * epochs, step * batch_size / ROWS
        for fact in (
            f"{step:,}",
            f"from 0 to {learning_rate * 1e6:.2f}e-6",
            f"after {seen:.2f} epochs, inside the {warmup:.0f} epochs of warm-up",
            f"theirs: {epochs}, never reached",
            f"{batch_size} triplets do not fill more",
        ):
            assert fact in prose, (name, fact)


@every_recipe
def test_without_the_network_check_says_what_is_missing(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["check", name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("gist-ray:")]
    assert "avsolatorio/medi-data-mteb_avs_triplets" in line and "cannot be had from the Hub" in line
    assert "give a local path" in line


def test_check_names_the_model_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "q", "pos": "p", "neg": "n"}) + "\n")
    assert main(["check", "gist-bge-small", "--set", f"data.sources=[{{path: {tmp_path}/a.jsonl}}]"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and re.search(r"model \S+/\S+ is no local folder and cannot be had from the Hub", err)


def checked(name: str, minilm: Path, tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    """What `check` derives with local rows and models."""
    (folder / "a.jsonl").write_text(json.dumps({"query": "q", "pos": "p", "neg": "n"}) + "\n")
    settings = {
        "data.sources": f"[{{path: {folder}/a.jsonl}}]",
        "student.path": str(minilm),
        "guide.path": str(tiny_model),
        "guide.max_tokens": "64",
        "output_dir": str(folder),
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert main(["check", name, *sets]) == 0
    derived: dict = yaml.safe_load(capsys.readouterr().out)["derived"]
    return derived


@every_recipe
def test_with_local_models_and_rows_it_checks(
    name: str, minilm: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    derived = checked(name, minilm, tiny_model, tmp_path, capsys)
    assert derived["student"]["max_tokens"] == 512  # not the 256 of MiniLM's folder
    assert derived["student"]["pooling"] == RELEASED[name][1]
    assert derived["batch"]["triplets_per_worker"] == RELEASED[name][2]


@pytest.mark.parametrize("name", ["gist-minilm", "gist-small"])
def test_our_own_recipes_check_and_say_which_rows_they_want(
    name: str, minilm: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert checked(name, minilm, tiny_model, tmp_path, capsys)["batch"]["triplets_per_worker"] == 64
    assert main(["check", name]) == 2
    assert "source mined does not exist" in capsys.readouterr().err
