"""Models change, replicas come, go and are killed, while clients ask: nobody is turned away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults.processes import alive
from tests.faults.serve_cluster import Clients, ServeCluster, serve_cluster

pytestmark = pytest.mark.slow

SMALL, LARGE = 32, 384


@pytest.fixture(scope="module")
def cluster() -> Iterator[ServeCluster]:
    with serve_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> dict[str, str]:
    return {"m": str(tiny_model)}


@pytest.fixture(scope="module")
def large(minilm: Path) -> dict[str, str]:
    return {"m": str(minilm)}


def metric(cluster: ServeCluster, name: str) -> float:
    lines = httpx.get(f"{cluster.url}/metrics", timeout=10, trust_env=False).text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}{{")]
    return float(line.rpartition(" ")[2])


def test_a_model_is_swapped_in_running_replicas(cluster: ServeCluster, small, large):
    cluster.deploy(models=small)
    cluster.wait("one replica", lambda: cluster.running(1))
    before = cluster.replicas()
    with Clients(cluster.url) as clients:
        time.sleep(2)
        cluster.deploy(models=large)
        cluster.wait("the new model answers", lambda: LARGE in clients.dims_since(0), 60)
        swapped = time.monotonic()
        time.sleep(2)
    assert not clients.failures() and len(clients.asked) > 100
    assert clients.dims_since(0) == {SMALL, LARGE} and clients.dims_since(swapped) == {LARGE}
    assert cluster.replicas() == before  # the same processes


def test_a_model_that_cannot_be_loaded_does_not_end_the_one_that_runs(cluster: ServeCluster, large, tmp_path: Path):
    before = cluster.replicas()
    with Clients(cluster.url) as clients:
        cluster.deploy(models={"m": str(tmp_path / "absent")})
        cluster.wait("the failure is counted", lambda: metric(cluster, "gist_ray_failed_swaps_total") == 1, 60)
        time.sleep(1)
    assert not clients.failures() and clients.dims_since(0) == {LARGE}
    assert cluster.replicas() == before
    cluster.deploy(models=large)
    cluster.wait("back", lambda: cluster.running(1))


def test_new_settings_come_with_new_replicas_before_the_old_ones_go(cluster: ServeCluster, small):
    before = cluster.replicas()
    with Clients(cluster.url) as clients:
        cluster.deploy(models=small, cache_mb=0)
        cluster.wait("replaced", lambda: cluster.running(1) and not before.keys() & cluster.replicas().keys())
        cluster.wait("the old replica is gone", lambda: not alive(list(before.values())), 60)
        time.sleep(1)
    assert not clients.failures() and clients.dims_since(0) == {LARGE, SMALL}


def test_replicas_come_with_the_load_and_go_with_it(cluster: ServeCluster, large):
    cluster.deploy(models=large, cache_mb=0, replicas=(1, 3))
    cluster.wait("one replica", lambda: cluster.running(1))
    with Clients(cluster.url, count=12, texts=16, words=100) as many:
        cluster.wait("three replicas", lambda: cluster.running(3))
        time.sleep(3)
    with Clients(cluster.url, count=1, pause_s=0.2) as few:
        cluster.wait("one replica again", lambda: cluster.running(1))
        time.sleep(2)
    assert not many.failures() and not few.failures()
    assert len(many.asked) > 20 and len(few.asked) > 20


def test_a_killed_replica(cluster: ServeCluster, small):
    cluster.deploy(models=small, cache_mb=0, replicas=(2, 2))
    cluster.wait("two replicas", lambda: cluster.running(2))
    victim, pid = next(iter(cluster.replicas().items()))
    with Clients(cluster.url) as clients:
        time.sleep(2)
        os.kill(pid, signal.SIGKILL)
        cluster.wait("replaced", lambda: cluster.running(2) and victim not in cluster.replicas())
        time.sleep(2)
    # At most one question a client was in flight on it.
    assert len(clients.failures()) <= clients.count, clients.failures()
    assert not clients.lost() and len(clients.asked) > 200


def test_a_killed_controller(cluster: ServeCluster, small, large):
    # The new controller takes over a replica that the old one was starting, too, and then ends one of three.
    cluster.wait("two replicas and no third", lambda: cluster.settled(2), 60)
    before = cluster.replicas()
    (pid,) = cluster.processes("ray::ServeController")
    with Clients(cluster.url) as clients:
        time.sleep(1)
        os.kill(pid, signal.SIGKILL)
        cluster.wait("a new controller", lambda: cluster.processes("ray::ServeController") not in ([], [pid]), 60)
        cluster.wait("it knows the replicas", lambda: cluster.running(2))
        cluster.deploy(models=large, cache_mb=0, replicas=(2, 2))  # and can still change them
        cluster.wait("the new model answers", lambda: LARGE in clients.dims_since(0), 60)
        time.sleep(2)
        cluster.wait("both have it", lambda: cluster.replicas() == before, 60)  # the same processes
    assert not clients.failures()


@pytest.mark.parametrize("name", ["haproxy -db", "ray::HAProxyManager"])
def test_a_killed_proxy(cluster: ServeCluster, small, name: str):
    """The one proxy of the one node: until there is another, connections are refused, and a client has to wait."""
    cluster.deploy(models=small, cache_mb=0)
    cluster.wait("one replica", lambda: cluster.running(1))
    with Clients(cluster.url, retry_s=15.0) as clients:
        time.sleep(3)  # a reload, which each change of replicas brings, is over
        killed = cluster.processes(name)
        if not killed:
            pytest.skip("HAProxy is not to be had on this machine")
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        time.sleep(17)
    # A client met the gap once, waited, and was answered.
    assert 1 <= len(clients.failures()) <= clients.count, clients.failures()
    assert not clients.lost() and len(clients.asked) > 100


def test_from_zero_replicas(cluster: ServeCluster, large):
    cluster.deploy(models=large, cache_mb=0, replicas=(0, 1))
    cluster.wait("no replica", lambda: cluster.running(0))
    started = time.monotonic()
    answer = httpx.post(f"{cluster.url}/embed", json={"inputs": "a"}, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - started < 15
