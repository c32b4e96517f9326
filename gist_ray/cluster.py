"""The Ray cluster a verb runs on: the one it is submitted to, or one of our own on this machine."""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from gist_ray.config import ClusterConfig
from gist_ray.errors import InputError
from gist_ray.ingress import ingress_environment

log = logging.getLogger(__name__)

_PORTS = range(20_000, 30_000)
"""Below those that kernels give to connections, above Ray's for workers, and beside Serve's for replicas."""
_WATCH_EVERY_S = 0.1
# Set before Ray or a worker of Ray starts; `setdefault` leaves the user's own choice alone.
_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; unset, it warns in every worker
    # How often Train takes in reports: a checkpoint waits for the one before to be taken, and the end for the last.
    # Ray's 2 s cost 14 s of a run of a minute with ten checkpoints; twice a second costs a call to each worker.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_gcs_server_port_wait_time_s": "120",  # Ray's 30 are not enough on a machine with much else to do
    "RAY_worker_niceness": "0",  # Ray's is 15: on a busy machine a replica would starve beside who asks it
    "TOKENIZERS_PARALLELISM": "false",
}

_made_tokens: set[str] = set()
"""Those of our own Rays, which no user knows."""


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Connect to Ray for the length of a `with` block.

    In order: the Ray this process is already connected to; `cluster.address`; `RAY_ADDRESS`, which Ray sets for
    submitted jobs; else a Ray of our own, on loopback, with a token that exists only in this process tree, in a
    temporary folder, shut down at the end.

    Raises:
        InputError: a cluster that asks for no token (`check_token`), or GPUs that this machine does not have.
    """
    ray_was_imported = "ray" in sys.modules
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if not ray_was_imported and not address:
        # Ray reads the mode once, at import. Later it is too late to set one, and Ray's own default for a local
        # cluster (a token, kept in the user's Ray folder) stands.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not _verbose():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ part logs harmless lines as errors
    if address:
        context = ray.init(address=address, log_to_driver=_verbose(), logging_level=logging.WARNING)
        try:
            if cluster.require_token:
                check_token(context.address_info["gcs_address"], context.dashboard_url, sent=_sends_token())
            _quiet_data()
            log.info("ray: dashboard http://%s, Prometheus targets at /api/prometheus/sd", context.dashboard_url)
            yield
        finally:
            ray.shutdown()
        return
    with _own_ray(cluster, own_token=not ray_was_imported and os.environ["RAY_AUTH_MODE"] == "token"):
        yield


def check_token(gcs_address: str, dashboard: str | None, *, sent: bool) -> None:
    """Refuse a cluster that runs what anybody on its network sends it.

    Its mode is known by trying: a cluster without authentication takes a token like any other, and ignores it.

    Args:
        gcs_address: `host:port` that this process is connected to.
        dashboard: `host:port`; None: there is none.
        sent: whether this process sent a token.

    Raises:
        InputError: it was reached without a token, or its dashboard answers without one. Not on loopback.
    """
    if is_loopback(gcs_address.rpartition(":")[0]):
        return
    if sent and not _answers_anybody(dashboard):
        return
    raise InputError(
        f"the Ray cluster at {gcs_address} asks for no token: who reaches it can run code there, and read these data. "
        "Start it with RAY_AUTH_MODE=token on every node (cluster/README.md); where nobody else can reach it, set "
        "cluster.require_token to false"
    )


def _sends_token() -> bool:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def _answers_anybody(dashboard: str | None) -> bool:
    if not dashboard:
        return False
    try:
        answer = httpx.get(f"http://{dashboard}/api/version", timeout=5, trust_env=False)
    except httpx.HTTPError:  # on the head's loopback, or behind a policy
        return False
    return answer.status_code == 200


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _own_ray(cluster: ClusterConfig, own_token: bool) -> Iterator[None]:
    import ray

    from gist_ray.targets import listed  # it imports torch

    # Unix sockets allow 107 characters, HAProxy 97: in a deeper TMPDIR the names of theirs would not fit.
    folder = tempfile.mkdtemp(prefix="gist-ray-", dir=None if len(tempfile.gettempdir()) < 8 else "/tmp")
    own_token = own_token and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if own_token:
        # It stays for the life of this process: Ray caches it, so a second Ray here must have the same.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        _made_tokens.add(os.environ["RAY_AUTH_TOKEN"])
    # For this Ray alone: the next one has other files and ports.
    ingress = {k: v for k, v in ingress_environment(Path(folder), free_port).items() if k not in os.environ}
    os.environ.update(ingress)
    try:
        context = ray.init(
            address="local",
            num_cpus=logical_cpus(cluster),
            include_dashboard=True,  # without it Train's placement-group cleaner logs an error every second
            dashboard_host="127.0.0.1",
            dashboard_port=free_port(),
            log_to_driver=_verbose(),
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
        _check_gpus(cluster)
        _quiet_data()
        [node] = ray.nodes()
        log.info("ray: metrics for Prometheus at http://127.0.0.1:%d/metrics", node["MetricsExportPort"])
        if os.environ.get("RAY_AUTH_TOKEN") not in _made_tokens:  # who does not know it cannot enter
            log.info("ray: dashboard http://%s", context.dashboard_url)
        with listed(Path(folder)), _watched():
            yield
    finally:
        ray.shutdown()
        for name in ingress:
            os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _watched() -> Iterator[None]:
    """Say at once that the raylet of our own Ray has ended, and what to do.

    Nothing may be said later: a driver that next asks a dead raylet for something is ended by Ray, in C++, without a
    word and without Python's own end. One that does not is told by Ray that some actor died.
    """
    import ray._private.worker
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET

    [raylet] = [info.process for info in ray._private.worker._global_node.all_processes[PROCESS_TYPE_RAYLET]]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_WATCH_EVERY_S):
            if raylet.poll() is not None:
                log.error(
                    "ray: its raylet (process %d) has ended with %d, by a kill or for want of memory, and what ran on "
                    "it is lost; run the same command again, it goes on from what is finished (train: with --resume)",
                    raylet.pid,
                    raylet.returncode,
                )
                return

    thread = threading.Thread(target=watch, daemon=True, name="gist-ray-raylet")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _check_gpus(cluster: ClusterConfig) -> None:
    """On this machine alone no GPU will join later: Ray would wait for it in silence."""
    import ray

    wanted = cluster.gpus_per_worker * max(cluster.max_workers(), cluster.data_workers)
    present = ray.cluster_resources().get("GPU", 0)
    if wanted > present:
        raise InputError(
            f"cluster.gpus_per_worker {cluster.gpus_per_worker} needs {wanted:g} GPUs, this machine has {present:g}; "
            "lower it, or num_workers and data_workers, or connect to a cluster with cluster.address"
        )


def _verbose() -> bool:
    """Workers' own output is shown with `--verbose` only; their errors reach the driver anyway."""
    return logging.getLogger("gist_ray").isEnabledFor(logging.DEBUG)


def _quiet_data() -> None:
    """Ray Data prints its plan and bars per data set; stages report their own progress."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.print_on_execution_start = False
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def logical_cpus(cluster: ClusterConfig) -> int:
    """CPUs to tell a local Ray of: enough for the training workers and, beside them, for Ray Data and actors.

    Training workers that hold every CPU starve a Ray Data task in silence, so a small machine
    advertises more than it has; threads, not this number, bound the real load.
    """
    training = cluster.max_workers() * cluster.cpus_per_worker
    return max(os.cpu_count() or 1, int(training) + cluster.data_workers + 2)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago.

    Not one that the kernel gives: those are handed to connections too, and what listens on this one may start later.
    """
    for port in random.SystemRandom().sample(_PORTS, 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            return port
    raise InputError(f"no free port on {host} among 100 from {_PORTS[0]} to {_PORTS[-1]}; name one")
