"""A Ray of our own leaves nothing behind, and its HAProxy has names and ports that no other has."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gist_ray.cluster import check_token, free_port
from gist_ray.errors import InputError
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


@contextmanager
def dashboard(status: int) -> Iterator[str]:
    """An HTTP server that answers as Ray's dashboard does to who sends no token."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            assert "Authorization" not in self.headers
            self.send_response(status if self.path == "/api/version" else 404)
            self.end_headers()

        def log_message(self, *args: object):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_cluster_that_answers_without_a_token_is_refused():
    with dashboard(200) as url, pytest.raises(InputError, match=r"10.0.0.5:6379 asks for no token.*require_token"):
        check_token("10.0.0.5:6379", url, sent=True)  # it took a token, as it takes anything


def test_a_cluster_that_was_reached_without_a_token_is_refused():
    with pytest.raises(InputError, match="asks for no token"):
        check_token("10.0.0.5:6379", None, sent=False)


KILLED = """
import logging, os, signal, sys, time
import ray
from gist_ray.cluster import connected
from gist_ray.config import ClusterConfig
from tests.faults.processes import descendants

logging.basicConfig(level=logging.INFO)
with connected(ClusterConfig()):
    [raylet] = [pid for pid, name in descendants(os.getpid()).items() if "/raylet/raylet" in name.split(" ")[0]]
    os.kill(raylet, signal.SIGKILL)
    time.sleep(5)
    ray.put(bytes(1_000_000))
    print("unreachable")
"""


def test_a_raylet_that_was_killed_is_named_before_ray_ends_the_driver():
    """Ray ends a driver that asks a dead raylet for something in C++, without a word."""
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "unreachable" not in done.stdout, done.stderr[-3000:]
    assert "raylet" in done.stderr and "has ended with -9" in done.stderr and "--resume" in done.stderr


@pytest.mark.parametrize("status", [401, 403])
def test_a_cluster_that_asks_for_a_token_is_used(status: int):
    with dashboard(status) as url:
        check_token("10.0.0.5:6379", url, sent=True)
    check_token("10.0.0.5:6379", url, sent=True)  # the dashboard cannot be reached from here: the token decides


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "[::1]:6379", "localhost:6379"])
def test_on_loopback_there_is_nobody_to_refuse(address: str):
    with dashboard(200) as url:
        check_token(address, url, sent=False)
