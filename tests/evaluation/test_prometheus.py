"""Prometheus: what a scrape of a real Ray node says of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from gist_ray.errors import InputError
from gist_ray.evaluation.eval_task import EvalTask
from gist_ray.evaluation.pool import encoder_pool
from gist_ray.evaluation.prometheus import TaskCounts
from gist_ray.evaluation.schedule import _in_turn
from tests.scrape import Samples, node_metrics


def tasks(*names: str) -> list[EvalTask]:
    return [EvalTask(name, "STS", "cosine_spearman", "1", None, 1) for name in names]


def scraped_until(holds: Callable[[Samples], Any]) -> Samples:
    """Ray sends them on every 10 s, not all at once."""
    deadline = time.monotonic() + 120
    while not holds(found := node_metrics("ray_gist_ray_evaluation_")) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


@pytest.mark.usefixtures("ray_session")
def test_a_scrape_of_ray_says_how_far_an_evaluation_is_and_where_vectors_came_from(minilm, tmp_path):
    import ray

    @ray.remote(num_cpus=0, max_retries=0)
    def unit(name: str) -> str:
        if name == "bad":
            raise InputError("no data")
        if name == "worse":
            raise RuntimeError("no luck")
        return name

    turns = _in_turn(
        tasks("a", "bad", "b", "worse", "c", "d"), lambda task: unit.remote(task.name), 2, 1, TaskCounts("org/m")
    )
    seen = [next(turns)[0].name for _ in range(4)]
    assert "worse" in [*seen, *(task.name for task, _ in turns)]
    halfway = _in_turn(tasks("a", "b", "c", "d"), lambda task: unit.remote(task.name), 2, 0, TaskCounts("org/half"))
    next(halfway), next(halfway)

    kept = (tmp_path, 1 << 30, {"of": "test"})
    with encoder_pool(minilm, workers=1, cpus=0.1, cache=kept, name="org/m") as pool:
        pool.encode(["a", "b", "c", "a"])
        pool.encode(["b", "c", "d"])

        def states(found: Samples, model: str) -> dict[str, float]:
            samples = found.get("tasks", [])
            return {labels["state"]: value for labels, value in samples if labels["model"] == model}

        def sources(found: Samples) -> dict[str, float]:
            samples = found.get("texts", [])
            return {labels["source"]: value for labels, value in samples if labels["model"] == "org/m"}

        found = scraped_until(lambda found: sources(found).get("cache") and states(found, "org/m"))
        assert states(found, "org/m") == {"waiting": 0, "running": 0, "done": 4, "failed": 2}
        # Two of four were given out before the third was started.
        assert states(found, "org/half") == {"waiting": 1, "running": 2, "done": 1, "failed": 0}
        assert sources(found) == {"computed": 4, "cache": 2}
