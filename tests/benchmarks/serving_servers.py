"""Servers of the serving benchmark: ours and a stock Ray Serve app, each in a process of its own, with its CPU time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

_OURS = """
import sys
from gist_ray.config import ClusterConfig
from gist_ray.serving_config import ServingConfig
from gist_ray.serving.app import serve
serve(sys.argv[1], ServingConfig.model_validate_json(sys.argv[2]), ClusterConfig(data_workers=1),
      lambda endpoint: print(endpoint.url, flush=True), model_id="model")
"""
READY_S = 180


@dataclass
class Server:
    """A running server."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU seconds of the server and everything below it, so far."""
        total = 0.0
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return total

    def memory_mb(self) -> float:
        """Resident memory of the largest process below the server: the replica."""
        return max(p.memory_info().rss for p in self.process.children(recursive=True)) / 1e6


@contextmanager
def our_server(model: str | Path, **settings: object) -> Iterator[Server]:
    """`gist-ray serve` with these serving settings, on a free port, without cache unless asked for."""
    import json

    config = json.dumps({"port": 0, "cache_mb": 0, **settings})
    with running([sys.executable, "-c", _OURS, str(model), config]) as server:
        yield server


@contextmanager
def stock_server(model: str | Path, backend: str) -> Iterator[Server]:
    """The same engine behind stock `@serve.batch`, FastAPI and the default proxy."""
    script = Path(__file__).with_name("serving_stock.py")
    with running([sys.executable, str(script), str(model), backend]) as server:
        yield server


@contextmanager
def infinity_server(python: str, model: str | Path, *options: str) -> Iterator[Server]:
    """infinity-emb on both cores, of the environment of `python`."""
    from gist_ray.cluster import free_port

    port = free_port()
    place = ["--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1"]
    named = ["--model-id", str(model), "--served-model-name", "model", "--device", "cpu"]
    command = [str(Path(python).with_name("infinity_emb")), "v2", *place, *named, *options]
    with running(command, url=f"http://127.0.0.1:{port}", ready="/health") as server:
        yield server


@contextmanager
def running(command: list[str], *, url: str = "", ready: str = "") -> Iterator[Server]:
    """A server that prints its URL when it answers, or answers 200 at `url` + `ready` then; ended by SIGTERM."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Nobody reads what a server says after its URL: a pipe would fill up, and the server stand still.
    stdout = subprocess.DEVNULL if ready else subprocess.PIPE
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        if ready:
            _wait(url + ready, process)
        else:
            assert process.stdout
            url = process.stdout.readline().strip()
        if not url.startswith("http"):
            raise RuntimeError(f"{command[:3]} did not start: {url!r}")
        time.sleep(1)  # what starts beside it settles
        yield Server(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise RuntimeError(f"{url} did not answer")
