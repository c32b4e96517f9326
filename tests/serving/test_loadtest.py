"""The load test that users get, against a real server in another process, without a model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gist_ray.cluster import free_port

LOADTEST = Path(__file__).parents[2] / "serve" / "loadtest.py"
_SPEC = importlib.util.spec_from_file_location("loadtest", LOADTEST)
assert _SPEC and _SPEC.loader
loadtest = importlib.util.module_from_spec(_SPEC)
sys.modules["loadtest"] = loadtest  # its dataclasses look their module up
_SPEC.loader.exec_module(loadtest)
SERVER = """
import asyncio, sys, uvicorn
from functools import partial
from gist_ray.serving.api import create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.gate import Access
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.scheduler import Scheduler

async def main():
    schedule = partial(Scheduler, batch_tokens=512, max_queue_tokens=2000)
    models = Models(lambda place: FakeEngine(delay_s=0.02), schedule)
    await models.replace({"fake": "nowhere"})
    app = create_api(models, Measures(models, ""), Access((sys.argv[2],)))
    await uvicorn.Server(uvicorn.Config(app, port=int(sys.argv[1]), log_level="warning")).serve()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    digest = hashlib.sha256(b"key").hexdigest()
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port), digest])
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{address}/ready", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def measured(url: str, *options: str, key: str = "key") -> tuple[int, dict]:
    command = [sys.executable, str(LOADTEST), url, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PATH": "", "API_KEY": key})
    return done.returncode, json.loads(done.stdout)


def test_a_closed_loop_counts_what_was_answered(url: str, tmp_path: Path):
    page = tmp_path / "load.html"
    code, found = measured(url, "--seconds", "2", "--concurrency", "8", "--per-request", "4", "--html", str(page))
    assert code == 0 and set(found["answers"]) == {"200"}
    count = found["answers"]["200"]
    assert found["texts_per_s"] == pytest.approx(4 * count / found["seconds"], rel=0.01)
    assert found["requests_per_s"] == pytest.approx(count / found["seconds"], rel=0.01)
    # Eight clients wait for answers of 20 ms at least.
    assert 20 <= found["latency_ms"]["p50"] <= found["latency_ms"]["p99"]
    assert count <= 8 * 2 / 0.02
    text = page.read_text()
    assert text.count("<circle") == count and "http" not in text


def test_an_open_loop_sends_on_time_and_shows_what_is_shed(url: str):
    code, found = measured(url, "--seconds", "3", "--rate", "20")
    assert code == 0 and set(found["answers"]) == {"200"}
    assert 30 <= found["answers"]["200"] <= 95  # 60 on average
    assert 2 <= found["seconds"] < 10
    code, found = measured(url, "--seconds", "3", "--rate", "150", "--per-request", "40")
    assert code == 0 and set(found["answers"]) == {"200", "429"}
    assert found["texts_per_s"] == pytest.approx(40 * found["answers"]["200"] / found["seconds"], rel=0.01)
    assert 300 <= sum(found["answers"].values()) <= 600


def test_a_wrong_key_is_a_failure(url: str):
    code, found = measured(url, "--seconds", "0.5", "--concurrency", "2", key="wrong")
    assert code == 1 and set(found["answers"]) == {"401"}


ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n%s\r\n{}"
ODD = {
    "closed after each answer": (ANSWER % b"connection: close\r\n", 200),
    "in chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", 200),
    "after a 100": (b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER % b"", 200),
    "an error": (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", 503),
    "cut short": (b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{}", -1),
    "no answer": (b"", -1),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", -1),
}


@pytest.mark.parametrize("name", ODD)
def test_answers_of_odd_servers_are_told_apart(name: str):
    """Each is asked again and again, on new connections where it ends them; what is not whole counts as no answer."""
    answer, status = ODD[name]
    ends = status == -1 or b"close" in answer

    class Server(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while length := self.headers():
                texts.extend(json.loads(self.rfile.read(length))["input"])
                self.wfile.write(answer)
                if ends:
                    return

        def headers(self) -> int:
            length = 0
            for line in iter(self.rfile.readline, b""):
                if line == b"\r\n":
                    break
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            return length

    texts: list[str] = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = loadtest.Target(f"http://127.0.0.1:{server.server_address[1]}/v1/embeddings")
        load = loadtest.closed_loop(target, loadtest.batched(["a", "b", "c"], 1), 2, seconds=0.5)
        server.shutdown()
    assert set(load.statuses()) == {status} and load.statuses()[status] > 10
    assert {"a", "b", "c"} == set(texts) and load.texts == (len(load.answers) if status == 200 else 0)


def test_a_server_that_is_not_there_is_no_answer():
    nowhere = loadtest.Target(f"http://127.0.0.1:{free_port()}/")
    load = loadtest.closed_loop(nowhere, loadtest.batched(["a"], 1), 1, seconds=0.05)
    assert set(load.statuses()) == {-1}
