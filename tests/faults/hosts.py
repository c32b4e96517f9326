"""Hosts on one machine: network namespaces on a bridge of their own, each with a node of one Ray cluster.

Needs root and iproute2. The hosts share this machine's disk, as nodes of a cluster share storage; the network between
them, their addresses and ports are theirs alone.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from gist_ray.serving.app import API_KEYS_VARIABLE
from tests.faults.processes import alive

ROOT = Path(__file__).parents[2]
HEAD, NODES, CLIENT = 0, (1, 2), 3
"""The head does no work; the client is no node: it submits, deploys and asks."""
MODEL, REPLICA = "m", "ray::ServeReplica"
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_UP_S = 120
_TOO_SLOW = "Exception: The current node timed out during startup"


@dataclass
class Hosts:
    """Four hosts: a head, two nodes, a client."""

    prefix: str
    folder: Path
    environment: dict[str, str]
    redis_password: str = ""
    """What the head gives to the Redis of RAY_REDIS_ADDRESS."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    """Ids of nodes that were alive once."""

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.address(HEAD)}:8265"

    def popen(self, host: int, *words: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
        """Start a program on a host; its output is in `stdout`."""
        return subprocess.Popen(
            self._on(host, *words),
            cwd=cwd,
            env=self.environment | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, host: int, *words: str, cwd: Path = ROOT, seconds: float = 300, **environment: str) -> str:
        """Run a program on a host to its good end, and return what it said."""
        process = self.popen(host, *words, cwd=cwd, **environment)
        try:
            said, _ = process.communicate(timeout=seconds)
        finally:
            process.kill()
        assert process.returncode == 0, f"{words}: exit code {process.returncode}: {said[-3000:]}"
        return said

    def deploy(self, file: Path, model: Path) -> None:
        """`serve deploy` of the shipped config with two replicas, from the client; `file` is written."""
        tree = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
        tree["http_options"]["host"] = "0.0.0.0"
        [application] = tree["applications"]
        application["args"]["serving"] |= {"min_replicas": 2, "max_replicas": 2, "batch_tokens": 512, "cache_mb": 0}
        application["deployments"][0]["user_config"]["models"] = {MODEL: str(model)}
        file.write_text(yaml.safe_dump(tree))
        self.run(CLIENT, "serve", "deploy", str(file))

    def answer(self, host: int, texts: list[str], key: str = "") -> tuple[int, str]:
        """Status and body of an answer that the client gets from a host; 0: it gets none."""
        command = ["curl", "-sS", "--max-time", "30", "-w", "\n%{http_code}", "-H", "content-type: application/json",
                   "-H", f"authorization: Bearer {key or self.environment[API_KEYS_VARIABLE]}",
                   "-d", json.dumps({"model": MODEL, "input": texts}),
                   f"http://{self.address(host)}:8000/v1/embeddings"]  # fmt: skip
        said, _ = self.popen(CLIENT, *command).communicate(timeout=60)
        body, _, status = said.rpartition("\n")
        return int(status) if status.isdigit() else 0, body

    def wait_until_served(self) -> None:
        """Two replicas run, and each node answers."""
        deadline = time.monotonic() + 180
        while not (len(self.with_process(REPLICA)) == 2 and all(self.answer(node, ["a"])[0] == 200 for node in NODES)):
            assert time.monotonic() < deadline, self.run(CLIENT, "serve", "status")
            time.sleep(1)

    @contextmanager
    def asked(self, host: int) -> Iterator[dict[str, Any]]:
        """Four clients ask a host, from the client. At the end: how often, what failed, what twice.

        Ten times a second each: more would take the CPUs with which a host comes back.
        """
        asking = f"""
import json, sys
from tests.faults.serve_cluster import Clients

key = "{self.environment[API_KEYS_VARIABLE]}"
with Clients("http://{self.address(host)}:8000", api_key=key, pause_s=0.1) as clients:
    print("asking", flush=True)
    sys.stdin.readline()
lost = [repr(asked) for asked in clients.lost()]
failures = [repr(asked) for asked in clients.failures()]
print(json.dumps({{"asked": len(clients.asked), "failures": failures, "lost": lost}}))
"""
        process, found = self.popen(CLIENT, sys.executable, "-c", asking), dict[str, Any]()
        try:
            assert process.stdout and process.stdout.readline() == "asking\n"
            yield found
            said, _ = process.communicate("\n", timeout=150)
            found |= json.loads(said.splitlines()[-1])
        finally:
            process.kill()

    def submit(self, job: str, *words: str, folder: Path) -> subprocess.Popen[str]:
        """Run a stage as a Ray job, from the client."""
        return self.popen(CLIENT, str(ROOT / "cluster/submit.sh"), job, *words, cwd=folder)

    def processes(self, host: int) -> dict[int, str]:
        """Command lines of what runs on a host."""
        said = subprocess.run(["ip", "netns", "pids", self._name(host)], capture_output=True, text=True, check=True)
        names = {}
        for pid in map(int, said.stdout.split()):
            with suppress(OSError):
                names[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return names

    def with_process(self, name: str) -> list[int]:
        """Nodes on which a process runs whose command line begins with `name`."""
        return [node for node in NODES if any(line.startswith(name) for line in self.processes(node).values())]

    def start(self, host: int) -> None:
        """Start a host's node and wait until the cluster counts it.

        Ray gives a node's agent 15 s to come up, and a busy machine is slower: then, and only then, the node is started
        again, as the supervisor of a real host does.
        """
        before, deadline = self.alive_nodes() | self.seen, time.monotonic() + _UP_S
        process = self._launch(host)
        # A count would miss a new node while one that is gone is counted yet.
        while not self.alive_nodes() - before:
            said = self._log(host).read_text()[-3000:]
            assert time.monotonic() < deadline, said
            if process.poll() is not None:
                assert said.rstrip().rpartition("\n")[2].startswith(_TOO_SLOW), said
                process = self._launch(host)
            time.sleep(0.5)

    def _launch(self, host: int) -> subprocess.Popen[bytes]:
        ports = ["--head", "--port=6379", "--dashboard-host=0.0.0.0", f"--temp-dir={self.folder}", "--num-cpus=0"]
        ports += [f"--redis-password={self.redis_password}"] if self.redis_password else []
        joins = [f"--address={self.address(HEAD)}:6379", "--num-cpus=3"]
        options = [f"--node-ip-address={self.address(host)}", "--object-store-memory=100000000"]
        command = self._on(host, *_RAY, "start", "--block", *(ports if host == HEAD else joins), *options)
        if host == HEAD:  # a new machine does not have it; with it, Ray takes the nodes it sees in `ps` for its own
            (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        # Unbuffered: what Ray said before it failed must not follow its last words.
        environment = self.environment | {"PYTHONUNBUFFERED": "1"}
        with self._log(host).open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.started.append(process)
        return process

    def _log(self, host: int) -> Path:
        return self.folder.parent / f"{self.folder.name}-{host}.log"

    def kill(self, host: int) -> None:
        """All at once, without a word: as if its power had gone."""
        pids = list(self.processes(host))
        assert pids, f"nothing runs on host {host}"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while alive(pids) and time.monotonic() < deadline:
            time.sleep(0.1)

    def cut(self, host: int, *, off: bool) -> None:
        """Take a host's cable out, or put it back: nobody is told, packets just no longer arrive."""
        _ip("-n", self._name(host), "link", "set", "eth0", "down" if off else "up")

    @contextmanager
    def slow(self, host: int, name: str) -> Iterator[None]:
        """Let the processes of a host whose command lines begin so run for half of the time only."""
        over = threading.Event()

        def halve() -> None:
            while not over.wait(0.05):
                pids = [pid for pid, line in self.processes(host).items() if line.startswith(name)]
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    for pid in pids:
                        with suppress(ProcessLookupError):
                            os.kill(pid, number)
                    time.sleep(0.05 if number == signal.SIGSTOP else 0)

        thread = threading.Thread(target=halve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def alive_nodes(self) -> set[str]:
        """Ids of those that the cluster takes for alive; none while it cannot be asked."""
        command = ["curl", "-sS", "--max-time", "5", "-H", f"authorization: Bearer {self.token}",
                   f"{self.dashboard}/api/v0/nodes"]  # fmt: skip
        said, _ = self.popen(CLIENT, *command).communicate(timeout=30)
        try:
            nodes = json.loads(said)["data"]["result"]["result"]
        except (ValueError, KeyError, TypeError):
            return set()
        found = {node["node_id"] for node in nodes if node["state"] == "ALIVE"}
        self.seen |= found
        return found

    @property
    def token(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]

    def _name(self, host: int) -> str:
        return f"{self.prefix}-{host}"

    def _on(self, host: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self._name(host), *words]


@contextmanager
def hosts(api_key: str, *, redis_password: str = "", **environment: str) -> Iterator[Hosts]:
    """Four hosts without a node; at the end whatever runs on them is killed."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    prefix = f"gist-ray-{secrets.token_hex(3)}"
    folder = Path(f"/tmp/{prefix}")  # short: names of sockets have a limit
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GIST_RAY_"))}
    clean |= {
        "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": "http://10.77.0.1:8265",
        "RAY_DASHBOARD_ADDRESS": "http://10.77.0.1:8265",
        "GLOO_SOCKET_IFNAME": "eth0",
        "RAY_worker_niceness": "0",  # Ray's 15 would starve them beside other tests
        API_KEYS_VARIABLE: api_key,
    }
    made = Hosts(prefix, folder, clean | environment, redis_password)
    watchdog = threading.Timer(2400, lambda: _kill_all(made))
    watchdog.start()
    switch = f"{prefix}-switch"
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in (HEAD, *NODES, CLIENT):
            name = f"{prefix}-{host}"
            _ip("netns", "add", name)
            _ip("-n", switch, "link", "add", f"port{host}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{made.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        watchdog.cancel()
        _kill_all(made)
        for name in (switch, *(f"{prefix}-{host}" for host in (HEAD, *NODES, CLIENT))):
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
        for log in folder.parent.glob(f"{folder.name}-*.log"):
            log.unlink()


def _kill_all(made: Hosts) -> None:
    for host in (*NODES, HEAD, CLIENT):
        for pid in made.processes(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for process in made.started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode and "Operation not permitted" in done.stderr:
        pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
