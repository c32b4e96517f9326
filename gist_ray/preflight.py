"""check: validate everything before any machine is asked for, and show the arithmetic."""

from __future__ import annotations

import yaml

from gist_ray.config import Recipe
from gist_ray.data.prepare import shards_fingerprint
from gist_ray.data.sources import content_digest, find_units
from gist_ray.encoder import Encoder, load_model, model_fingerprint
from gist_ray.training.engine import deepspeed_config

_FP32_BYTES = 4


def check(recipe: Recipe) -> str:
    """Resolve a recipe: its sources are found, its models load, and every derived number is stated. YAML.

    Raises:
        InputError: whatever `prepare` and `train` would raise before they start working.
    """
    units = find_units(recipe.data.sources)
    shards_fingerprint(recipe, units)
    student = load_model(recipe.student, layers=recipe.student.layers)
    guide = load_model(recipe.guide)
    derived = {
        "run_dir": str(recipe.run_dir()),
        "sources": [{"path": unit.name, "kind": unit.kind, "content": content_digest(unit)[:16]} for unit in units],
        "student": _model_facts(student) | {"content": model_fingerprint(recipe.student)["weights"][:16]},
        "guide": _model_facts(guide) | {"content": model_fingerprint(recipe.guide)["weights"][:16]},
        "batch": {
            "triplets_per_step": recipe.train.batch_size,
            "triplets_per_worker": -(-recipe.train.batch_size // recipe.cluster.max_workers()),
            "candidates_per_query": _candidates(recipe),
        },
        "memory_mb_per_worker": _memory(recipe, student),
        "deepspeed": deepspeed_config(recipe.train, recipe.cluster.max_workers()),
    }
    resolved = {"recipe": recipe.model_dump(mode="json"), "derived": derived}
    return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip()


def _model_facts(encoder: Encoder) -> dict[str, object]:
    return {
        "parameters": sum(p.numel() for p in encoder.model.parameters()),
        "dim": encoder.dim,
        "max_tokens": encoder.max_tokens,
        "pooling": encoder.pooling,
    }


def _candidates(recipe: Recipe) -> int:
    """Most candidates a query can meet in a step, with one negative a row: its own texts are not among them."""
    others = recipe.train.batch_size - 1
    return others + recipe.train.batch_size + others * (recipe.loss.contrast_queries + recipe.loss.contrast_positives)


def _memory(recipe: Recipe, student: Encoder) -> dict[str, float]:
    """Weights, gradients and Adam moments in megabytes; ZeRO stages divide what they shard by the workers."""
    parameters = sum(p.numel() for p in student.model.parameters())
    megabytes = parameters * _FP32_BYTES / 1e6
    workers, stage = recipe.cluster.max_workers(), recipe.train.zero_stage
    return {
        "weights": round(megabytes / (workers if stage >= 3 else 1), 1),
        "gradients": round(megabytes / (workers if stage >= 2 else 1), 1),
        "adam_moments": round(2 * megabytes / (workers if stage >= 1 else 1), 1),
    }
