"""How many units are at work, and in which order."""

from __future__ import annotations

import os

import pytest

from gist_ray.evaluation.eval_task import EvalTask
from gist_ray.evaluation.schedule import largest_first, units_at_work


@pytest.mark.parametrize(
    ("nodes", "cores", "units"),
    [
        ([True], 64, 6),  # four actors and two more
        ([True], 3, 3),  # never more than cores
        ([True, False], 1, 2),  # a node that left does not count; encoding and scoring overlap on one core too
        ([True, True], 1, 6),  # the driver's node says nothing of the others
    ],
)
def test_no_more_units_than_a_lone_machine_has_cores(
    nodes: list[bool], cores: int, units: int, monkeypatch: pytest.MonkeyPatch
):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": alive} for alive in nodes])
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert units_at_work(4) == units


def test_the_dearest_task_is_first_by_what_was_measured():
    tasks = [EvalTask(name, "STS", "cosine_spearman", "1", None, cost) for name, cost in (("a", 1), ("b", 9), ("c", 4))]

    def order(seconds: dict[str, float]) -> str:
        return "".join(task.name for task in largest_first(tasks, seconds))

    assert order({}) == "bca"
    assert order({"a": 30.0, "b": 9.0}) == "cab"  # c by the median of 30 and 1 seconds a unit of cost: 62
    assert order({"c": 8.0, "unknown": 1.0}) == "bca"
