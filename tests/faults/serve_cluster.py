"""A Ray of its own with Serve and HAProxy, deployed to as in production, and clients that ask it all the time."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from gist_ray.cluster import free_port
from gist_ray.serving.app import API_KEYS_VARIABLE
from tests.faults.processes import descendants

_DRIVER = """
import sys
from gist_ray.cluster import connected
from gist_ray.config import ClusterConfig

with connected(ClusterConfig(data_workers=6)):
    import ray
    print(ray._private.worker.global_worker.node.webui_url, flush=True)
    sys.stdin.read()
    from ray import serve
    serve.shutdown()
"""
_QUICK = {
    # Serve's usual seconds, so that a test need not wait for them.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


@dataclass
class ServeCluster:
    """Where it is."""

    url: str
    port: int
    dashboard: str
    token: str
    process: subprocess.Popen[str]

    def deploy(self, **changes: Any) -> None:
        """What `serve deploy` sends; it returns before it is done."""
        config = application(**changes)
        tree = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [config],
        }
        answer = self._dashboard("PUT", json=tree)
        assert answer.status_code == 200, answer.text

    def status(self) -> dict[str, Any]:
        """Of the one application: its state, and its replicas' states."""
        answer = self._dashboard("GET")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["applications"].get("gist-ray", {})
        return found

    def replicas(self) -> dict[str, int]:
        """Running replicas: id to process id."""
        return {replica["replica_id"]: replica["pid"] for replica in self._replicas() if replica["state"] == "RUNNING"}

    def settled(self, count: int) -> bool:
        """So many replicas run, and none comes or goes."""
        return [replica["state"] for replica in self._replicas()] == ["RUNNING"] * count

    def _replicas(self) -> list[dict[str, Any]]:
        deployments = self.status().get("deployments", {})
        found: list[dict[str, Any]] = deployments.get("embedder", {}).get("replicas", [])
        return found

    def wait(self, what: str, holds: Any, seconds: float = 120) -> float:
        """Seconds until `holds()`."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            assert self.process.poll() is None
            if holds():
                return time.monotonic() - started
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {what}; {self.status()}")

    def running(self, count: int) -> bool:
        """The application is up, with so many replicas."""
        return self.status().get("status") == "RUNNING" and len(self.replicas()) == count

    def processes(self, name: str) -> list[int]:
        """Process ids of those whose command line has `name`."""
        return [pid for pid, command in descendants(self.process.pid).items() if name in command]

    def _dashboard(self, method: str, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.token}"}
        url = f"{self.dashboard}/api/serve/applications/"
        return httpx.request(method, url, headers=headers, timeout=60, trust_env=False, **options)


def application(
    models: dict[str, str],
    *,
    replicas: tuple[int, int] = (1, 1),
    upscale_s: float = 0.5,
    downscale_s: float = 2.0,
    to_zero_s: float | None = None,
    **serving: Any,
) -> dict[str, Any]:
    """An application of a Serve config, on these models."""
    args = {"drain_s": 10, "serving": {"batch_tokens": 512, **serving}}
    scaling = {
        "min_replicas": replicas[0],
        "max_replicas": replicas[1],
        "upscale_delay_s": upscale_s,
        "downscale_delay_s": downscale_s,
        "look_back_period_s": 2,
        "policy": {"policy_function": "gist_ray.serving.autoscaling:replicas_for_backlog"},
    }
    embedder = {"name": "embedder", "user_config": {"models": models}, "autoscaling_config": scaling}
    return {
        "name": "gist-ray",
        "route_prefix": "/",
        "import_path": "gist_ray.serving.app:build_app",
        "args": args,
        "deployments": [embedder],
    }


@contextmanager
def serve_cluster() -> Iterator[ServeCluster]:
    token, port = secrets.token_hex(32), free_port()
    # Without the API keys of a server of other tests, which may run in this process.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != API_KEYS_VARIABLE}
    environment = {**clean, **_QUICK, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-c", _DRIVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    watchdog = threading.Timer(900, process.kill)
    watchdog.start()
    try:
        assert process.stdin and process.stdout
        dashboard = process.stdout.readline().strip()
        assert dashboard, "Ray did not start"
        yield ServeCluster(f"http://127.0.0.1:{port}", port, f"http://{dashboard}", token, process)
        process.stdin.close()
        process.wait(90)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait(20)


@dataclass
class Asked:
    """One question: when, which model answered (by its dimensions), what went wrong first, and in the retry."""

    at: float
    dim: int = 0
    error: str = ""
    retry_error: str = ""


@dataclass
class Clients:
    """Ask all the time, each on a connection of its own; a question that fails is asked once more."""

    url: str
    count: int = 4
    texts: int = 1
    words: int = 8
    pause_s: float = 0.01
    retry_s: float = 1.0
    api_key: str = ""
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)

    def failures(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.error]

    def lost(self) -> list[Asked]:
        """Those that the retry did not help."""
        return [asked for asked in self.asked if asked.retry_error]

    def dims_since(self, at: float) -> set[int]:
        return {asked.dim for asked in self.asked if asked.at > at and asked.dim}

    def _ask(self, number: int) -> None:
        client = httpx.Client(timeout=60, trust_env=False)
        turn = 0
        while not self._over.is_set():
            turn += 1
            body = {"input": [f"{number} {turn} {i} " + "word " * self.words for i in range(self.texts)]}
            asked = Asked(time.monotonic())
            asked.dim, asked.error = self._once(client, body)
            if asked.error:
                client.close()
                time.sleep(self.retry_s)
                client = httpx.Client(timeout=60, trust_env=False)
                asked.dim, asked.retry_error = self._once(client, body)
            self.asked.append(asked)
            time.sleep(self.pause_s)
        client.close()

    def _once(self, client: httpx.Client, body: dict[str, Any]) -> tuple[int, str]:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            answer = client.post(f"{self.url}/v1/embeddings", json=body, headers=headers)
        except httpx.HTTPError as error:
            return 0, repr(error)
        if answer.status_code != 200:
            return 0, f"{answer.status_code} {answer.text[:200]}"
        return len(answer.json()["data"][0]["embedding"]), ""
