from pathlib import Path

import pytest
from pydantic import ValidationError

from gist_ray.config import Recipe
from gist_ray.errors import InputError
from gist_ray.mine_config import MineConfig
from gist_ray.recipe_file import RECIPES_DIR, load_recipe, parse_recipe, parsed_settings

MINIMAL = {
    "name": "n",
    "data": {"sources": [{"path": "a.jsonl"}]},
    "student": {"path": "s"},
    "guide": {"path": "g"},
}


@pytest.mark.parametrize("file", sorted(RECIPES_DIR.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_parses(file: Path):
    assert load_recipe(file.stem) == load_recipe(file)


def test_unknown_key_names_the_nearest_valid_one():
    with pytest.raises(InputError, match=r"unknown key `train\.learning_rat`; did you mean `train\.learning_rate`"):
        parse_recipe({**MINIMAL, "train": {"learning_rat": 1}})
    with pytest.raises(InputError, match=r"unknown key `trian`; did you mean `train`"):
        parse_recipe({**MINIMAL, "trian": {}})
    with pytest.raises(InputError, match=r"unknown key `data\.sources\.0\.pth`; did you mean `data\.sources\.0\.path`"):
        parse_recipe({**MINIMAL, "data": {"sources": [{"path": "a", "pth": "b"}]}})


def test_every_problem_is_named_with_place_and_value():
    with pytest.raises(InputError) as caught:
        parse_recipe({**MINIMAL, "train": {"epochs": 0, "batch_size": "many"}, "guide": {}})
    message = str(caught.value)
    for part in ("`guide.path` is required", "`train.epochs`", "got 0", "`train.batch_size`", "got 'many'"):
        assert part in message


def test_overrides(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text("name: a\ndata: {sources: [{path: x}]}\nstudent: {path: s}\nguide: {path: g}\n")
    recipe = load_recipe(file, ("train.learning_rate=2e-5", "name=b", "student.layers=[0, 2]", "loss.guide=none"))
    assert (recipe.train.learning_rate, recipe.name, recipe.student.layers, recipe.loss.guide) == (
        2e-5,
        "b",
        (0, 2),
        "none",
    )
    for bad in ("train", "=3", "name.x=1", "train.learning_rate=fast", "nothing.at_all=1"):
        with pytest.raises(InputError):
            load_recipe(file, (bad,))


def test_bad_files(tmp_path: Path):
    with pytest.raises(InputError, match=r"does not exist.*quickstart"):
        load_recipe(tmp_path / "missing.yaml")
    for content in ("- a list", "a: [", "\x00"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(InputError, match=r"bad\.yaml"):
            load_recipe(tmp_path / "bad.yaml")


def test_the_tree_is_frozen_and_refuses_contradictions():
    recipe = parse_recipe(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.epochs = 3  # type: ignore[misc]
    for section in (
        {"data": {"sources": [{"path": "hf://a/b"}]}},
        {"data": {"sources": []}},
        {"train": {"batch_size": 2}, "cluster": {"num_workers": 3}},
        {"student": {"path": "s", "layers": [2, 0]}},
        {"serving": {"min_replicas": 2, "max_replicas": 1}},
        {"name": "../up"},
    ):
        with pytest.raises(InputError):
            parse_recipe({**MINIMAL, **section})


def test_derived_numbers():
    recipe = parse_recipe({**MINIMAL, "output_dir": "/o", "train": {"warmup_ratio": 0.25}})
    assert recipe.train.warmup_steps(10) == 2
    assert recipe.shards_dir() == Path("/o/n/shards")
    assert isinstance(recipe, Recipe)


def test_quoted_numbers_stay_strings_and_local_models_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "r.yaml"
    file.write_text("name: a\ndata: {sources: [{path: x}]}\nstudent: {path: models/s}\nguide: {path: org/g}\n")
    assert load_recipe(file, ('name="2024"',)).name == "2024"
    (tmp_path / "models" / "s").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # workers start elsewhere: a relative path would mean another model there
    recipe = load_recipe(file)
    assert (recipe.student.path, recipe.guide.path) == (str(tmp_path / "models" / "s"), "org/g")
    for bad in ("student.prompt=x", "data.sources=[{path: hf://a/b, revision: main}]"):
        with pytest.raises(InputError):
            load_recipe(file, (bad,))


def source(**options):
    return parse_recipe({**MINIMAL, "data": {"sources": [{"path": "x", **options}]}}).data.sources[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"qeury": "q"}}, "`qeury` is none of our columns"),
        ({"columns": {"query": ["a", "b"]}}, "only `neg` takes several"),
        ({"tasks": "mteb["}, "not a regular expression"),
        ({"weight": 0}, "weight"),
        ({"path": "s3://AKIA:hush@bucket/rows/"}, "the path holds a password"),
    ],
)
def test_bad_sources_are_said_so_and_no_secret_repeated(options, message: str):
    with pytest.raises(InputError, match=message) as caught:
        source(**options)
    assert "hush" not in str(caught.value)


def test_sources_take_mappings_weights_and_selections():
    found = source(columns={"query": "q", "neg": ["n1", "n2"]}, weight=0.5, tasks="^mteb[-_]", max_rows=3)
    assert found.columns == {"query": "q", "neg": ("n1", "n2")} and found.weight == 0.5
    assert source(path="s3://anonymous@bucket/rows/").path == "s3://anonymous@bucket/rows/"


def test_mining_settings_name_the_nearest_key():
    tree = {"source": {"path": "x"}, "guide": {"path": "g"}}
    assert parsed_settings(MineConfig, {**tree}, "mine", ("top_k=7", "guide.max_tokens=32")).guide.max_tokens == 32
    with pytest.raises(InputError, match=r"unknown key `guide\.max_token`; did you mean `guide\.max_tokens`"):
        parsed_settings(MineConfig, {**tree, "guide": {"path": "g"}}, "mine", ("guide.max_token=3",))
