"""Prometheus: what a scrape of a real Ray node gives."""

import time

import pytest

from gist_ray.training.prometheus import RayMetrics
from tests.scrape import node_metrics

LINES = [
    {"step": 10, "total_steps": 40, "loss": 2.5, "batch_size": 8, "examples_per_s": 80.0, "grad_norm": None,
     "rows_crc32": 7, "clock_s": 1.7e9,
     "phases": {"forward": [0.5, 0.75], "gather": []}},
    {"time": 1.0, "step": 10, "event": "validation", "score": 0.875, "score/a task": 0.5},
    {"step": 20, "total_steps": 40, "loss": 1.5, "batch_size": 8, "examples_per_s": 90.0,
     "phases": {"forward": [0.25, 1.25]}},
    {"step": 15, "loss": 1.75},
]  # fmt: skip


def scraped() -> dict[str, dict[tuple[str, ...], float]]:
    """Metrics of `my-run`: name to (run, phase, rank, event) to value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for name, values in node_metrics("ray_gist_ray_train_").items():
        for tag, value in values:
            if tag["run"] == "my-run":  # other tests have theirs on this Ray
                found.setdefault(name, {})[tuple(tag[t] for t in ("run", "phase", "rank", "event") if t in tag)] = value
    return found


@pytest.mark.usefixtures("ray_session")
def test_a_scrape_of_ray_has_the_metrics_of_the_run():
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def train(self) -> None:
            sink = RayMetrics("my-run")
            for line in LINES:
                sink.log(line)

    worker = Worker.remote()
    ray.get(worker.train.remote())
    # Ray sends them on every 10 s, not all at once.
    wanted = {"loss", "step", "examples_per_s", "validation_score", "phase_seconds", "steps_total", "events_total"}
    deadline, found = time.monotonic() + 120, {}
    while not wanted <= set(found) and time.monotonic() < deadline:
        time.sleep(0.5)
        found = scraped()
    run = ("my-run",)
    assert found["loss"] == {run: 1.75} and found["step"] == {run: 15} and found["examples_per_s"] == {run: 90}
    assert found["validation_score"] == {run: 0.875} and found["events_total"] == {(*run, "validation"): 1}
    assert found["phase_seconds"] == {(*run, "forward", "0"): 0.25, (*run, "forward", "1"): 1.25}
    assert found["steps_total"] == {run: 1 + 10} and found["examples_total"] == {run: 88}
    assert not {"time", "validation_time", "grad_norm", "rows_crc32", "clock_s"} & set(found)
    assert {name for name in found if name.startswith("validation")} == {"validation_step", "validation_score"}
    ray.kill(worker)
