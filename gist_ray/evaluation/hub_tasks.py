"""Hub tasks: MTEB's own, by name or by benchmark, with what they cost."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mteb
from mteb.abstasks.aggregated_task import AbsTaskAggregate

from gist_ray.errors import InputError
from gist_ray.evaluation.eval_task import EvalTask, mteb_class

_LONGEST_CHARACTERS = 2048
"""Of a text what lies behind is cut off by most models: 512 tokens."""
_UNKNOWN_COST = 1e6


@dataclass(frozen=True)
class Average:
    """A task that is the average over others, its parts."""

    name: str
    parts: tuple[str, ...]
    task: Any
    """The mteb task, which combines results."""


def hub_tasks(names: tuple[str, ...]) -> tuple[list[EvalTask], list[Average]]:
    """MTEB's tasks of these names; an average over tasks gives its parts.

    Raises:
        InputError: no such task, with the nearest names.
    """
    tasks: dict[str, EvalTask] = {}
    averages = []
    for name in dict.fromkeys(names):
        known = mteb_class(name)
        if known is None:
            near = difflib.get_close_matches(name, [task.metadata.name for task in mteb.get_tasks()], n=3)
            raise InputError(f"MTEB has no task {name}; near it are: {', '.join(near) or 'none'}")
        if issubclass(known, AbsTaskAggregate):
            average = known()
            averages.append(_average(average))
            for part in average.metadata.tasks:
                tasks[part.metadata.name] = _task(part, functools.partial(_part, name, part.metadata.name))
        else:
            tasks[name] = _task(known(), known)
    return list(tasks.values()), averages


def benchmark_tasks(name: str) -> tuple[list[EvalTask], list[Average]]:
    """The tasks of a benchmark of MTEB, e.g. `MTEB(eng, v2)` or `NanoBEIR`, with its splits and languages.

    Raises:
        InputError: no such benchmark, with the nearest name.
    """
    try:
        benchmark = mteb.get_benchmark(name)
    except KeyError as error:
        raise InputError(f"MTEB has no benchmark {str(error.args[0]).lstrip()}") from None
    tasks: dict[str, EvalTask] = {}
    averages = []
    for task in benchmark.tasks:
        if isinstance(task, AbsTaskAggregate):
            averages.append(_average(task))
        for part in _parts(task):
            key = part.metadata.name
            tasks[key] = _task(part, functools.partial(_member, name, key))
    return list(tasks.values()), averages


def characters(task: Any) -> float:
    """Characters of the distinct texts of a task's splits, from the statistics that ship with mteb."""
    statistics = task.metadata.descriptive_stats or {}
    return sum(
        sum(_text_characters(_of_subsets(statistics[split], task.hf_subsets)))
        for split in task.eval_splits
        if split in statistics
    )


def _of_subsets(split: dict[str, Any], subsets: list[str] | None) -> Any:
    by_subset = split.get("hf_subset_descriptive_stats") or {}
    chosen = [by_subset[subset] for subset in subsets or () if subset in by_subset]
    return chosen or split


def _text_characters(statistics: Any) -> Iterator[float]:
    """Of each part of a task that holds texts: distinct texts times their mean length, cut where models cut."""
    if isinstance(statistics, list):
        for item in statistics:
            yield from _text_characters(item)
    elif isinstance(statistics, dict):
        if "unique_texts" in statistics and "average_text_length" in statistics:
            yield (statistics["unique_texts"] or 0) * min(statistics["average_text_length"], _LONGEST_CHARACTERS)
            return
        for key, item in statistics.items():
            if key != "hf_subset_descriptive_stats":
                yield from _text_characters(item)


def _task(task: Any, make: Any) -> EvalTask:
    metadata = task.metadata
    return EvalTask(
        metadata.name,
        str(metadata.type),
        metadata.main_score,
        metadata.revision,
        make,
        characters(task) or _UNKNOWN_COST,
    )


def _average(task: Any) -> Average:
    return Average(task.metadata.name, tuple(part.metadata.name for part in task.metadata.tasks), task)


def _parts(task: Any) -> list[Any]:
    return list(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task]


def _part(average: str, name: str) -> Any:
    """A fresh task that is part of an average."""
    return copy.deepcopy(_named(mteb_class(average)().metadata.tasks, name))


def _member(benchmark: str, name: str) -> Any:
    """A fresh task of a benchmark: with its splits, languages and subsets, which the task of that name may lack."""
    parts = [part for task in mteb.get_benchmark(benchmark).tasks for part in _parts(task)]
    return copy.deepcopy(_named(parts, name))


def _named(tasks: list[Any], name: str) -> Any:
    return next(task for task in tasks if task.metadata.name == name)
