"""Contamination: which tasks' data a model has seen, by name and by text, as far as that is known."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from gist_ray.int8 import PROVENANCE

_WORDS = re.compile(r"[^a-z0-9]+")
_KINDS = ("classification", "clustering", "retrieval", "reranking", "benchmark", "corpus")
"""Endings of MTEB's task names, which data sets' names lack."""


def training_sets(model: str | Path) -> list[str]:
    """Names of what a model was trained on: of a folder that gist-ray exported, of a model that MTEB knows, or none.

    The names are those of data sources and their tasks in `gist_ray.json`, or of MTEB's tasks.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _registered(str(model))
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    recipe = provenance.get("recipe", {})
    sources = [Path(source["path"]).name for source in recipe.get("data", {}).get("sources", [])]
    student = recipe.get("student", {}).get("path")
    return sorted({*sources, *provenance.get("tasks", []), *(training_sets(student) if student else [])})


def trained_on(report: dict[str, Any], task: str) -> bool:
    """Whether a report's model was trained on a task's training data, by name.

    Names are compared without case, punctuation and kinds of tasks: `banking77` is that of Banking77Classification.
    """
    plain = _plain(task)
    return any(_plain(name) == plain for name in report.get("training_sets", []))


def contamination(report: dict[str, Any], row: dict[str, Any]) -> str:
    """Why a task's score may flatter a report's model; empty: nothing is known.

    Texts say more than names: which share of each part of the task's data the model was trained on, to the letter. A
    name alone, of a task that shares no text with the training data as far as that is known, says "by name".

    Args:
        report: what `report.json` holds.
        row: a task of it.
    """
    seen: dict[str, list[int]] = row.get("trained_on") or {}
    shares = [f"{part} {_share(trained / asked)}" for part, (asked, trained) in sorted(seen.items()) if trained]
    return ", ".join(shares) or ("by name" if trained_on(report, row["name"]) else "")


def _share(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2g} %"


@functools.lru_cache
def _registered(name: str) -> list[str]:
    import mteb

    try:
        known = mteb.get_model_meta(name).get_training_datasets()
    except (KeyError, OSError, ValueError):  # not a model that MTEB knows
        return []
    return sorted(known or ())


def _plain(name: str) -> str:
    words = _WORDS.sub("", name.lower().split(".")[0])
    for kind in _KINDS:
        words = words.removesuffix(kind)
    return words
