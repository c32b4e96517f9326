"""The README is followed word for word: its commands must exist, its recipe must parse."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from gist_ray.cli import _parser
from gist_ray.recipe_file import parse_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_recipe_parses():
    recipe, source = (yaml.safe_load(block) for block in blocks("yaml"))
    recipe["data"]["sources"].append({"path": "more.jsonl", **source})
    assert parse_recipe(recipe).name == "mine"


def test_every_command_parses():
    text, inner = README, r"\$\((gist-ray [^()]*)\)"
    commands: list[str] = []
    while found := re.findall(inner, text):
        commands += found
        text = re.sub(inner, "PATH", text)
    verbs = "quickstart|mine|check|prepare|train|export|evaluate|compare|embed|serve"
    commands += re.findall(rf"gist-ray (?:{verbs})[^`|\n&)]*", text)
    assert len(commands) >= 10
    for command in commands:
        _parser().parse_args(shlex.split(command)[1:])


def test_the_two_promised_commands_are_there_and_in_ci():
    assert 'pip install -e ".[quickstart]" && gist-ray quickstart' in README
    assert 'pip install -e ".[dev]" && pytest' in README
    assert '-e ".[dev]" && pytest' in (ROOT / ".ci" / "run").read_text()


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "name", ["cli", "config", "encoder", "manifest", "cluster", "model_folder", "preflight", "tour", "html"]
)
def test_the_tree_names_real_files(name: str):
    assert f"{name}.py" in README and (ROOT / "gist_ray" / f"{name}.py").is_file()
