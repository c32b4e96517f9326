"""Recipe file: YAML and `KEY=VALUE` overrides to a validated recipe, or to one message that says what to mend.

An unknown key is told with the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gist_ray.config import Recipe
from gist_ray.errors import InputError

# YAML 1.1 reads `2e-5` as a string; people mean the number.
_YAML_1_1_MISSES = re.compile(r"^[+-]?\d+(\.\d*)?[eE][+-]?\d+$")
RECIPES_DIR = Path(__file__).parent / "recipes"

_Tree = TypeVar("_Tree", bound=BaseModel)


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a YAML recipe and apply `a.b=value` overrides (values are YAML).

    `path` is a file, or the name of a shipped recipe such as `quickstart`.

    Raises:
        InputError: missing file, YAML error, unknown key (with the nearest valid one) or bad value.
    """
    file = _recipe_file(Path(path))
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file}: a recipe is a mapping of sections, this is a {type(tree).__name__}")
    return parsed_settings(Recipe, tree, str(file), overrides)


def parse_recipe(tree: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Validate a recipe tree.

    Raises:
        InputError: one line per problem, each with its place.
    """
    return parsed_settings(Recipe, tree, origin)


def parsed_settings(kind: type[_Tree], tree: dict[str, Any], origin: str, overrides: tuple[str, ...] = ()) -> _Tree:
    """Validate a tree of settings, after `a.b=value` overrides (values are YAML). `origin` begins the message.

    Raises:
        InputError: one line per problem, each with its place.
    """
    for override in overrides:
        _apply(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        # A list with a bad element is "too short" too: pydantic counts the good ones.
        own = [p for p in problems if not any(o is not p and o["loc"][: len(p["loc"])] == p["loc"] for o in problems)]
        lines = [_explain(problem, kind) for problem in own]
        raise InputError(f"{origin}: " + "; ".join(lines)) from None


def _recipe_file(path: Path) -> Path:
    shipped = RECIPES_DIR / f"{path}.yaml"
    if path.is_file():
        return path
    if path.parent == Path() and shipped.is_file():
        return shipped
    names = sorted(file.stem for file in RECIPES_DIR.glob("*.yaml"))
    raise InputError(f"recipe {path} does not exist; give a YAML file or a shipped recipe: {', '.join(names)}")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {override}: expected KEY=VALUE, e.g. --set train.learning_rate=2e-5")
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        elif isinstance(node, dict):
            node = node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise InputError(f"--set {override}: `{parent}` is a value, not a section")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML: {error}") from error
    if _YAML_1_1_MISSES.match(value.strip()):
        parsed = float(value)
    if not isinstance(node, dict):
        raise InputError(f"--set {override}: only keys of a section can be set, `{key}` is an element of a list")
    node[leaf] = parsed


def _explain(problem: Any, root: type[BaseModel]) -> str:
    place = [str(part) for part in problem["loc"]]
    dotted = ".".join(place) or "recipe"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], _keys_beside(place, root), n=1, cutoff=0.5)
        hint = (
            f"did you mean `{'.'.join([*place[:-1], near[0]])}`?"
            if near
            else ("valid keys: " + ", ".join(_keys_beside(place, root)))
        )
        return f"unknown key `{dotted}`; {hint}"
    if problem["type"] == "missing":
        return f"`{dotted}` is required"
    message = problem["msg"].removeprefix("Value error, ")
    return f"`{dotted}`: {message}" + (
        "" if isinstance(problem["input"], dict | list) else f" (got {problem['input']!r})"
    )


def _keys_beside(place: list[str], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in place[:-1]:
        if part.isdigit():
            continue
        annotation: Any = model.model_fields[part].annotation
        inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = inner[0] if inner else annotation
    return list(model.model_fields)
