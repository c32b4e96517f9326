"""Replica: the models, their HTTP routes and gRPC methods, as Ray Serve runs them in one process."""

from __future__ import annotations

import logging
import sys
import threading
import time
from functools import partial
from typing import Any

from fastapi import FastAPI

from gist_ray.serving.api import create_api
from gist_ray.serving.autoscaling import Workload
from gist_ray.serving.engine import load_engine
from gist_ray.serving.gate import Access
from gist_ray.serving.grpc_route import GrpcRoute
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.scheduler import Scheduler
from gist_ray.serving.serve_args import ServeArgs, UserConfig
from gist_ray.serving.tracing import Tracing

log = logging.getLogger(__name__)

HEALTH_DEADLINE_S = 20.0
SWITCH_S = 0.0005
"""How long a thread that wants to go on may have to wait for another; Python's 5 ms is a small forward."""


class Replica:
    """One copy of the models with its own ingress. Serve makes it; `build_app` says how many.

    Serve calls, in this order: `__init__`, `__serve_build_asgi_app__`, `reconfigure` with the models, `check_health`;
    then requests come in. Later `reconfigure` again, for each change of `user_config`.
    """

    def __init__(self, args: ServeArgs, api_key_sha256: tuple[str, ...]) -> None:
        import ray.util
        from ray import serve

        sys.setswitchinterval(SWITCH_S)
        _log_as_serve_does()
        config = args.serving
        self._models = Models(
            partial(load_engine, backend=config.backend, precision=config.precision, threads=config.threads),
            partial(
                Scheduler,
                batch_tokens=config.batch_tokens,
                max_queue_tokens=config.max_queue_tokens,
                cache_bytes=int(config.cache_mb * 1e6),
                turn=threading.Lock(),
            ),
        )
        self._measures = Measures(self._models, serve.get_replica_context().replica_id.unique_id)
        self._workload = Workload(time.monotonic())
        own = {"127.0.0.1", "::1", ray.util.get_node_ip_address()}
        peers = frozenset(own if args.local_only else ())
        self._access = Access(api_key_sha256, peers, access_log=args.access_log)
        self._tracing = Tracing.from_environment()
        self._grpc = GrpcRoute(self._models, self._measures, self._access, self._tracing)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._models, self._measures, self._access, self._tracing)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve the models of a `user_config`. Called by Serve, while requests run.

        A replica that serves already keeps what it has if the new models cannot be loaded: Serve would end it, and all
        others in turn, for a misspelt folder. The failure is logged and counted in `gist_ray_failed_swaps_total`.
        """
        try:
            await self._models.replace(UserConfig.model_validate(user_config).models)
        except Exception:
            if not self._models.ready:
                raise
            self._measures.swap_failed()
            log.exception("the new models cannot be served; the old ones stay")

    async def Embed(self, message: Any, grpc_context: Any) -> Any:
        """The gRPC method `gist_ray.v1.Embeddings/Embed`; Serve finds it by its name."""
        return await self._grpc.embed(message, grpc_context)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: what `replicas_for_backlog` decides by."""
        schedulers = [served.scheduler for served in self._models]
        queue_s = sum(scheduler.queued_tokens / max(1e-9, scheduler.tokens_per_second) for scheduler in schedulers)
        forward_s = sum(scheduler.counters.forward_seconds for scheduler in schedulers)
        return self._workload.report(time.monotonic(), queue_s, forward_s)

    async def check_health(self) -> None:
        """Called by Serve: a real forward, so that a stuck or broken engine is replaced."""
        await self._models.probe(HEALTH_DEADLINE_S)

    async def __del__(self) -> None:
        if hasattr(self, "_models"):  # not if __init__ failed
            await self._models.close()


def _log_as_serve_does() -> None:
    """Send gist-ray's lines where Serve's go, in its form (text or JSON), with the replica's name.

    Otherwise nobody handles them in a replica, and what is below WARNING is lost.
    """
    ours, serves = logging.getLogger("gist_ray"), logging.getLogger("ray.serve")
    ours.handlers = serves.handlers  # the very list: Serve changes it when its configuration changes
    ours.setLevel(serves.level)
    ours.propagate = False
