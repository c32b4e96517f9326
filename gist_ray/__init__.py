"""gist-ray: from text triplets to a served embedding model on a Ray cluster.

Every verb of the command line is a function here. They are imported when they are first used, so that
`import gist_ray` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gist_ray.config import Recipe
    from gist_ray.data.mine import mine
    from gist_ray.data.prepare import prepare
    from gist_ray.embed_config import EmbedConfig
    from gist_ray.embedding.run import embed
    from gist_ray.encoder import Encoder
    from gist_ray.errors import InputError
    from gist_ray.evaluation.compare import compare
    from gist_ray.evaluation.run import evaluate
    from gist_ray.mine_config import MineConfig
    from gist_ray.model_folder import export
    from gist_ray.preflight import check
    from gist_ray.recipe_file import load_recipe
    from gist_ray.serving.app import serve, serve_model
    from gist_ray.tour import quickstart
    from gist_ray.training.run import train

__all__ = [
    "EmbedConfig",
    "Encoder",
    "InputError",
    "MineConfig",
    "Recipe",
    "check",
    "compare",
    "embed",
    "evaluate",
    "export",
    "load_recipe",
    "mine",
    "prepare",
    "quickstart",
    "serve",
    "serve_model",
    "train",
]

_HOMES = {
    "EmbedConfig": "embed_config",
    "Encoder": "encoder",
    "InputError": "errors",
    "MineConfig": "mine_config",
    "Recipe": "config",
    "check": "preflight",
    "compare": "evaluation.compare",
    "embed": "embedding.run",
    "evaluate": "evaluation.run",
    "export": "model_folder",
    "load_recipe": "recipe_file",
    "mine": "data.mine",
    "prepare": "data.prepare",
    "quickstart": "tour",
    "serve": "serving.app",
    "serve_model": "serving.app",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gist_ray' has no attribute {name!r}")
    return getattr(import_module(f"gist_ray.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
