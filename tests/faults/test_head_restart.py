"""The head dies and comes back, with its state in Redis: those who ask the nodes notice nothing."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.hosts import CLIENT, HEAD, NODES, Hosts, hosts

pytestmark = pytest.mark.slow

PORT = 6400


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Hosts]:
    """Redis runs on the client's host, and outlives the head."""
    if not shutil.which("redis-server"):
        pytest.skip("needs redis-server, of Debian's package redis-server")
    password = secrets.token_hex(16)
    with hosts("a-key", redis_password=password, RAY_REDIS_ADDRESS=f"10.77.0.4:{PORT}") as made:
        redis = ["redis-server", "--port", str(PORT), "--bind", "0.0.0.0", "--requirepass", password, "--save", ""]
        made.popen(CLIENT, *redis, cwd=tmp_path)
        for host in (HEAD, *NODES):
            made.start(host)
        yield made


def test_serving_goes_on_without_its_head_and_is_managed_again_after_it(
    cluster: Hosts, tiny_model: Path, minilm: Path, tmp_path: Path
):
    cluster.deploy(tmp_path / "serve.yaml", tiny_model)
    cluster.wait_until_served()
    replicas = {pid for node in NODES for pid, name in cluster.processes(node).items() if "ServeReplica" in name}
    with cluster.asked(NODES[0]) as found:
        time.sleep(2)
        cluster.kill(HEAD)
        time.sleep(10)
        cluster.start(HEAD)
        deadline = time.monotonic() + 120
        while len(cluster.alive_nodes()) != 3:
            assert time.monotonic() < deadline
            time.sleep(1)
        time.sleep(5)
    assert found["asked"] > 200 and not found["lost"] and not found["failures"], found
    kept = {pid for node in NODES for pid, name in cluster.processes(node).items() if "ServeReplica" in name}
    assert kept == replicas
    cluster.deploy(tmp_path / "serve.yaml", minilm)
    deadline = time.monotonic() + 120
    while '"embedding"' not in (body := cluster.answer(NODES[1], ["a"])[1]) or body.count(",") < 300:
        assert time.monotonic() < deadline, body[:300]
        time.sleep(1)
