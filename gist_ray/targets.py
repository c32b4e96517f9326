"""Targets: where a Prometheus server finds the Rays that gist-ray has started on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gist_ray.converted_models import cache_folder

log = logging.getLogger(__name__)

_WRITTEN_BY_RAY = "prom_metrics_service_discovery.json"


def targets_folder() -> Path:
    """Prometheus reads it by `file_sd_configs`, see cluster/observability/prometheus.yaml."""
    return cache_folder() / "prometheus"


@contextmanager
def listed(ray_folder: Path) -> Iterator[None]:
    """Name the Ray with its files in `ray_folder` in `targets_folder()`, for the length of a `with` block.

    A link to the list of metrics ports that Ray keeps up to date. Links that killed processes left behind are removed.
    A cache that cannot be written to is no error: who watches a run never stops it.
    """
    folder, host = targets_folder(), socket.gethostname()
    link = folder / f"{host}-{os.getpid()}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob(f"{host}-*.json"):
            if not Path(f"/proc/{other.stem.removeprefix(f'{host}-')}").exists():
                other.unlink(missing_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(ray_folder / _WRITTEN_BY_RAY)
    except OSError as error:
        log.debug("Prometheus will not find this Ray: %s", error)
    try:
        yield
    finally:
        with suppress(OSError):
            link.unlink(missing_ok=True)
