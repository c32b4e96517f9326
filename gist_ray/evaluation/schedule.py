"""Schedule: units on workers, largest first, some at a time, whatever fails."""

from __future__ import annotations

import logging
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gist_ray.errors import InputError
from gist_ray.evaluation.any_pool import AnyPool
from gist_ray.evaluation.eval_task import EvalTask
from gist_ray.evaluation.prometheus import TaskCounts
from gist_ray.evaluation.training_texts import TrainingTexts
from gist_ray.evaluation.unit import ModelName, UnitResult, ready, scored

log = logging.getLogger(__name__)

_DEATHS = 3  # a unit that ends its process this often is itself the cause
MORE_THAN_ACTORS = 2
"""Units at work beside as many as there are encoder actors: while some score, others encode."""


def largest_first(tasks: list[EvalTask], seconds: Mapping[str, float]) -> list[EvalTask]:
    """Tasks by what they cost, the dearest first: those that were measured by their seconds, others by their size."""
    rates = [seconds[task.name] / task.cost for task in tasks if seconds.get(task.name) and task.cost]
    rate = statistics.median(rates) if rates else 1.0
    return sorted(tasks, key=lambda task: -(seconds.get(task.name) or task.cost * rate))


def units_at_work(actors: int) -> int:
    """Units at work at a time.

    On a machine alone, one more than it has cores would do no work of its own, and the start of its process, which
    imports mteb, takes ten CPU-seconds from the others.
    """
    import ray

    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    wanted = actors + MORE_THAN_ACTORS
    return min(wanted, max(2, os.cpu_count() or 1)) if alone else wanted


def start_processes(units: int) -> None:
    """Let the processes of so many units import what they need, while the actors load their model."""
    import ray

    start = ray.remote(ready).options(num_cpus=0)
    for _ in range(units):
        start.remote()


def outcomes(
    tasks: list[EvalTask],
    pool: AnyPool,
    model: ModelName,
    *,
    retries: int = 0,
    trained_on: TrainingTexts | None = None,
) -> Iterator[tuple[EvalTask, UnitResult | Exception]]:
    """Each task with its result, or with the error that its last try ended in, as they end.

    Units run in processes that hold a CPU of their own where the cluster has one to spare.
    """
    import ray

    # What Ray may not start it lets wait in silence: a cluster whose CPUs are all held by the actors gives none.
    spare = ray.available_resources().get("CPU", 0)
    unit = ray.remote(scored).options(num_cpus=1 if spare >= 1 else 0, max_retries=_DEATHS - 1)
    shared, texts = ray.put(pool), ray.put(trained_on)
    width = units_at_work(len(pool.actors))
    counts = TaskCounts(model.name)
    try:
        yield from _in_turn(tasks, lambda task: unit.remote(task, shared, model, texts), width, retries, counts)
    finally:
        counts.close()


def _in_turn(
    tasks: list[EvalTask], start: Callable[[EvalTask], Any], width: int, retries: int, counts: TaskCounts
) -> Iterator[tuple[EvalTask, UnitResult | Exception]]:
    import ray

    waiting, running = deque((task, 0) for task in tasks), dict[Any, tuple[EvalTask, int]]()
    while waiting or running:
        while waiting and len(running) < width:
            task, tries = waiting.popleft()
            running[start(task)] = (task, tries)
        counts.at_work(len(waiting), len(running))
        [ref], _ = ray.wait(list(running), num_returns=1)
        task, tries = running.pop(ref)
        try:
            outcome = ray.get(ref)
        except InputError as error:  # Ray's subclass of it; another try would find the same
            outcome = InputError(str(getattr(error, "cause", error)))
        except ray.exceptions.RayError as error:
            if tries < retries:
                log.warning("%s failed, try %d of %d: %s", task.name, tries + 1, retries + 1, reason(error))
                waiting.append((task, tries + 1))
                continue
            outcome = error
        counts.ended(failed=isinstance(outcome, Exception))
        yield task, outcome
    counts.at_work(0, 0)


def reason(error: BaseException) -> str:
    """The last line of an error, without Ray's traceback."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"
