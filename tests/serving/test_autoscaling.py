from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_ray.serving.autoscaling import TARGET_BUSY, TARGET_QUEUE_S, Workload, replicas_for_backlog


def context(queue_s: list[float], busy: list[float], requests: float = 1) -> Any:
    metrics = {"queue_s": dict(enumerate(queue_s)), "busy": dict(enumerate(busy))}
    return SimpleNamespace(aggregated_metrics=metrics, total_num_requests=requests)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), min_size=1, max_size=8))
def test_with_as_many_replicas_nobody_would_be_over_its_target(loads: list[tuple[float, float]]):
    queue_s, busy = ([load[i] for load in loads] for i in (0, 1))
    wanted, state = replicas_for_backlog(context(queue_s, busy))
    assert wanted >= 1 and state == {}
    assert sum(queue_s) / wanted <= TARGET_QUEUE_S + 1e-5 and sum(busy) / wanted <= TARGET_BUSY + 1e-5
    if wanted > 1:  # and with one less somebody would
        less = wanted - 1
        assert sum(queue_s) / less > TARGET_QUEUE_S or sum(busy) / less > TARGET_BUSY


@pytest.mark.parametrize(
    ("queue_s", "busy", "requests", "wanted"),
    [
        ([], [], 0, 0),  # nothing to do: down to the minimum
        ([0.0], [0.0], 0, 0),
        ([0.0], [0.0], 1, 1),  # somebody is being answered
        ([0.0], [0.5], 0, 1),
        ([2.0], [1.0], 50, 4),
        ([0.1, 0.1, 0.1], [0.2, 0.2, 0.2], 3, 1),
        ([0.0, 0.0], [0.9, 0.9], 9, 3),
    ],
)
def test_examples(queue_s: list[float], busy: list[float], requests: float, wanted: int):
    assert replicas_for_backlog(context(queue_s, busy, requests))[0] == wanted


def test_without_reports_yet_requests_alone_count():
    for metrics in (None, {}, {"queue_s": None}):
        ask = SimpleNamespace(aggregated_metrics=metrics, total_num_requests=3)
        assert replicas_for_backlog(ask)[0] == 1


def test_a_replica_reports_what_waits_and_how_busy_it_was():
    workload = Workload(now_s=100.0)
    assert workload.report(110.0, 0.5, forward_s=4.0) == {"queue_s": 0.5, "busy": 0.4}
    assert workload.report(120.0, 0.0, forward_s=14.0) == {"queue_s": 0.0, "busy": 1.0}
    assert workload.report(120.0, 0.0, forward_s=14.0)["busy"] == 0.0
    assert workload.report(130.0, 0.0, forward_s=3.0)["busy"] == 0.0  # a model was swapped out
