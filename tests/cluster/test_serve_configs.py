"""Serve configs: Ray accepts misspelt keys in silence, so their keys are compared with its schema's here."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from importlib import import_module
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from gist_ray.serving.serve_args import ServeArgs, UserConfig
from tests.cluster.manifests import KUBERNETES, ROOT, Manifest, at, documents, walk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

CONFIGS = {file.name: yaml.safe_load(file.read_text()) for file in sorted((ROOT / "serve").glob("*.yaml"))}
CONFIGS["serveConfigV2"] = yaml.safe_load(
    documents(KUBERNETES / "base" / "serving" / "ray-service.yaml")[0]["spec"]["serveConfigV2"]
)
every_config = pytest.mark.parametrize("name", CONFIGS)
OURS = {"args": ServeArgs, "user_config": UserConfig}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation may be, or be a list of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, list, tuple):
        return [model for part in get_args(annotation) for model in models_in(part)]
    return []


def unknown_keys(tree: Any, model: type[BaseModel], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that no field of the model has, at any depth that has a model. `args` and `user_config` are ours."""
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None:
            yield (*path, key)
            continue
        inner = [OURS[key]] if key in OURS else models_in(field.annotation)
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            if inner and isinstance(item, dict):
                where = (*path, key, number) if isinstance(value, list) else (*path, key)
                yield from unknown_keys(item, inner[0], where)


def is_valid(config: Manifest) -> bool:
    if list(unknown_keys(config, ServeDeploySchema)):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ServeDeploySchema.model_validate(config)
        for application in config["applications"]:
            ServeArgs.model_validate(application.get("args", {}))
            for deployment in application["deployments"]:
                UserConfig.model_validate(deployment["user_config"])
    except (ValidationError, KeyError):
        return False
    return True


@every_config
def test_it_is_valid(name: str):
    assert list(unknown_keys(CONFIGS[name], ServeDeploySchema)) == []
    assert is_valid(CONFIGS[name])


@every_config
def test_every_misspelt_key_is_found(name: str):
    config = CONFIGS[name]
    paths = [(*path, key) for path, node in walk(config) if isinstance(node, dict) for key in node]
    paths = [path for path in paths if path[-2:-1] != ("models",)]  # names of models are anybody's choice
    assert len(paths) > 15
    for path in paths:
        wrong = copy.deepcopy(config)
        parent = at(wrong, path[:-1])
        parent[f"{path[-1]}s"] = parent.pop(path[-1])
        assert not is_valid(wrong), path


@every_config
def test_what_it_imports_is_there_and_what_it_deploys_is_named_so(name: str):
    for application in CONFIGS[name]["applications"]:
        module, _, attribute = application["import_path"].partition(":")
        assert callable(getattr(import_module(module), attribute))
        assert [deployment["name"] for deployment in application["deployments"]] == ["embedder"]
    for function in CONFIGS[name].get("grpc_options", {}).get("grpc_servicer_functions", []):
        module, _, attribute = function.rpartition(".")
        assert callable(getattr(import_module(module), attribute))
