"""The Ray cluster a verb runs on: the one it is submitted to, or one of our own on this machine."""

from __future__ import annotations

import logging
import os
import random
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gist_ray.config import ClusterConfig
from gist_ray.errors import InputError
from gist_ray.ingress import ingress_environment

_PORTS = range(20_000, 30_000)
"""Below those that kernels give to connections, above Ray's for workers, and beside Serve's for replicas."""
# Set before Ray or a worker of Ray starts; `setdefault` leaves the user's own choice alone.
_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; unset, it warns in every worker
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Connect to Ray for the length of a `with` block.

    In order: the Ray this process is already connected to; `cluster.address`; `RAY_ADDRESS`, which Ray sets for
    submitted jobs; else a Ray of our own, on loopback, with a token that exists only in this process tree, in a
    temporary folder, shut down at the end.
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
        ray.init(address=address, log_to_driver=_verbose(), logging_level=logging.WARNING)
        _quiet_data()
        try:
            yield
        finally:
            ray.shutdown()
        return
    with _own_ray(cluster, own_token=not ray_was_imported and os.environ["RAY_AUTH_MODE"] == "token"):
        yield


@contextmanager
def _own_ray(cluster: ClusterConfig, own_token: bool) -> Iterator[None]:
    import ray

    # Unix sockets allow 107 characters, HAProxy 97: in a deeper TMPDIR the names of theirs would not fit.
    folder = tempfile.mkdtemp(prefix="gist-ray-", dir=None if len(tempfile.gettempdir()) < 8 else "/tmp")
    own_token = own_token and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if own_token:
        # It stays for the life of this process: Ray caches it, so a second Ray here must have the same.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # For this Ray alone: the next one has other files and ports.
    ingress = {k: v for k, v in ingress_environment(Path(folder), free_port).items() if k not in os.environ}
    os.environ.update(ingress)
    try:
        ray.init(
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
        yield
    finally:
        ray.shutdown()
        for name in ingress:
            os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)


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
