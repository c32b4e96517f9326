"""submit.sh on a real Ray: its exit code is the job's status, and an id is one job at a time."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gist_ray.cluster import free_port
from tests.cluster.manifests import CLUSTER
from tests.faults.processes import descendants

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head on loopback, with a token and ports of its own; what a caller of submit.sh exports."""
    folder = Path(f"/tmp/submit-{secrets.token_hex(3)}")  # short: sockets' names have a limit
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    bin_folder = str(Path(sys.executable).parent)
    clean |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    clean["PATH"] = f"{bin_folder}:{clean['PATH']}"
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port")
    ports = {name: free_port() for name in names}
    options = [f"--{name}={port}" for name, port in ports.items()]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", *options,
               "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--object-store-memory=100000000"]  # fmt: skip
    log = tmp_path_factory.mktemp("ray") / "log"
    with log.open("w") as output:
        head = subprocess.Popen(command, env=clean, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    clean["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        deadline = time.monotonic() + 120
        while ray(clean, "job", "list").returncode:
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(1)
        yield clean
    finally:
        started = [head.pid, *descendants(head.pid)]
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def ray(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def submit(environment: dict[str, str], folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(CLUSTER / "submit.sh"), *words],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(environment: dict[str, str], job: str, word: str) -> None:
    deadline = time.monotonic() + 120
    while word not in ray(environment, "job", "status", job).stdout:
        assert time.monotonic() < deadline
        time.sleep(1)


def test_it_sends_the_folder_shows_the_log_and_ends_as_the_job(environment: dict[str, str], tmp_path: Path):
    (tmp_path / "note.txt").write_text("carried along")
    (tmp_path / "ignored.bin").write_text("left behind")
    (tmp_path / ".rayignore").write_text("*.bin\n")
    for _ in range(2):  # the second time the id is that of a finished job
        job = submit(environment, tmp_path, "one", "bash", "-c", "cat note.txt; ls")
        output, _ = job.communicate(timeout=180)
        assert job.returncode == 0, output
        assert "carried along" in output and "ignored.bin" not in output and output.endswith("one succeeded\n")
    job = submit(environment, tmp_path, "one", "bash", "-c", "exit 7")
    output, _ = job.communicate(timeout=180)
    assert job.returncode == 1 and output.endswith("one failed\n")


def test_a_running_job_is_followed_and_a_stopped_one_is_no_success(environment: dict[str, str], tmp_path: Path):
    first = submit(environment, tmp_path, "two", "sleep", "600")
    wait_for(environment, "two", "RUNNING")
    second = submit(environment, tmp_path, "two", "sleep", "600")
    time.sleep(5)
    assert second.poll() is None
    assert ray(environment, "job", "list").stdout.count("submission_id='two'") == 1
    assert ray(environment, "job", "stop", "two").returncode == 0
    for job in (first, second):
        output, _ = job.communicate(timeout=180)
        assert job.returncode == 1 and output.endswith("two stopped\n")


def test_without_the_token_nothing_runs(environment: dict[str, str], tmp_path: Path):
    job = submit(environment | {"RAY_AUTH_TOKEN": "wrong" * 8}, tmp_path, "three", "true")
    output, _ = job.communicate(timeout=180)
    assert job.returncode == 1 and "three" not in ray(environment, "job", "list").stdout, output
