"""A Ray of our own leaves nothing behind, and its HAProxy has names and ports that no other has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gist_ray.cluster import free_port
from gist_ray.ingress import ingress_environment

SOCKETS = ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH")
LONGEST_SOCKET = 97  # HAProxy's
TWICE = """
import os
from gist_ray.cluster import connected
from gist_ray.config import ClusterConfig

seen = []
for _ in range(2):
    with connected(ClusterConfig(data_workers=1)):
        seen.append(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"])
        assert os.environ["RAY_SERVE_HAPROXY_NBTHREAD"] == "3"
left = [name for name in os.environ if name.startswith("RAY_SERVE_")]
assert left == ["RAY_SERVE_HAPROXY_NBTHREAD"], left
assert seen[0] != seen[1], seen
assert not any(os.path.exists(os.path.dirname(path)) for path in seen)
"""


def test_haproxys_files_lie_in_the_clusters_folder_and_fit_its_limit():
    folder = Path("/tmp/gist-ray-12345678")
    names = ingress_environment(folder, free_port)
    assert names["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    for name in SOCKETS:
        path = Path(names[name])
        assert path.is_relative_to(folder)
        assert len(str(path.parent / ("f" * 56) / path.name)) <= LONGEST_SOCKET  # Serve puts a hash of 56 between
    ports = [names["RAY_SERVE_HAPROXY_METRICS_PORT"], names["RAY_SERVE_HAPROXY_STATS_PORT"]]
    assert len(set(ports)) == 2
    assert not set(ports) & {"9101", "8404"}  # those of every other cluster on the machine


def test_without_haproxy_serve_keeps_its_own_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gist_ray.ingress.find_spec", lambda name: None)
    assert ingress_environment(Path("/tmp/x"), free_port) == {}


def test_two_rays_one_after_the_other_have_their_own_settings():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_SERVE_HAPROXY_NBTHREAD"] = "3"  # the user's own choice
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
