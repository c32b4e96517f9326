"""Gauges stay where Ray alone would forget them."""

from __future__ import annotations

import time

import pytest

from gist_ray.gauges import Gauges
from tests.scrape import node_metrics


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_gauge_that_is_set_once_stays_until_it_is_closed():
    gauges = Gauges("gist_ray_test_", run="r")
    gauges.set("value", 1, of="a")
    gauges.set("value", 2, of="b")
    gauges.set("value", 3, of="b")

    def seen() -> dict[str, float]:
        found = node_metrics("ray_gist_ray_test_").get("value", [])
        return {labels["of"]: value for labels, value in found if labels["run"] == "r"}

    deadline = time.monotonic() + 60
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(9)  # Ray's two intervals are 6 s in tests
    assert seen() == {"a": 1, "b": 3}
    gauges.close()
    deadline = time.monotonic() + 60
    while seen() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not seen()
