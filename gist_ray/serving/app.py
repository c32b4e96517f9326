"""App: the Ray Serve application, and an endpoint on this machine.

Ray is imported inside the functions: its authentication mode is decided at import (see `gist_ray.cluster`).
Annotations are objects here, not strings: Serve reads that of `build_app` to validate `args:` of its YAML.
"""

import errno
import hashlib
import io
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from gist_ray.cluster import connected, free_port, is_loopback
from gist_ray.config import ClusterConfig
from gist_ray.encoder import fingerprint
from gist_ray.errors import InputError
from gist_ray.serving.grpc_messages import SERVICER_FUNCTION
from gist_ray.serving.replica import HEALTH_DEADLINE_S, Replica
from gist_ray.serving.serve_args import ServeArgs
from gist_ray.serving_config import ServingConfig

log = logging.getLogger(__name__)

API_KEYS_VARIABLE = "GIST_RAY_API_KEYS"
"""Environment variable with the accepted API keys, comma separated. Unset or empty: no key is asked for."""
MAX_ONGOING_REQUESTS = 512
"""Requests a replica holds at once. Many, so that batches fill; the queue's tokens are the real limit."""
LOOK_BACK_S = 20.0
"""Over which the autoscaler takes the mean of what replicas report; they do every 10 s."""
READY_TIMEOUT_S = 60.0
_APP_NAME = "gist-ray"


@dataclass(frozen=True)
class Endpoint:
    """A running server.

    Attributes:
        url: its root, without a slash at the end; the OpenAI base URL is `{url}/v1`.
        model_id: the name under which the model is served.
        grpc_port: of the gRPC route on the same host; None: there is none.
    """

    url: str
    model_id: str
    grpc_port: int | None = None


def build_app(args: ServeArgs) -> Any:
    """The application of a Serve config: `import_path: gist_ray.serving.app:build_app`.

    Reads the API keys from the environment variable GIST_RAY_API_KEYS, and passes on their hashes only.

    Raises:
        InputError: the model cannot be served.
    """
    for place in (args.models or {}).values():
        check_model(place)
    return _application(args)


def _application(args: ServeArgs) -> Any:
    from ray import serve

    config = args.serving
    deployment = serve.deployment(
        name="embedder",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        user_config={"models": args.models} if args.models else None,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "initial_replicas": max(1, config.min_replicas),
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "look_back_period_s": LOOK_BACK_S,
            "policy": {"policy_function": "gist_ray.serving.autoscaling:replicas_for_backlog"},
        },
        ray_actor_options={"num_cpus": config.threads},
        health_check_timeout_s=HEALTH_DEADLINE_S + 10,
        max_surge_percent=20,  # rounded up: a new replica starts before an old one goes, also of one
        graceful_shutdown_timeout_s=args.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=3,  # a model that cannot be loaded three times will not be loaded
        logging_config={"enable_access_log": False},  # a line per request costs more than a small request
    )(serve.ingress()(Replica))
    return deployment.bind(args, _api_key_hashes())


def check_model(model: str) -> None:
    """Find out cheaply whether a model can be served.

    Raises:
        InputError: no such model, no safetensors weights, or a layout that is not supported.
    """
    fingerprint(model, revision=None, max_tokens=None, pooling=None, prompt="")


@contextmanager
def serve_model(
    model: str | Path,
    config: ServingConfig = ServingConfig(),  # noqa: B008 - frozen
    cluster: ClusterConfig = ClusterConfig(),  # noqa: B008 - frozen
    *,
    model_id: str | None = None,
) -> Iterator[Endpoint]:
    """Serve a model for the length of a `with` block.

    Raises:
        InputError: the model cannot be served, the port is in use, or the Ray cluster already runs Serve.
        RuntimeError: the replica did not start.
    """
    # A relative path would mean another folder to the replica, which starts elsewhere.
    folder = Path(model).expanduser()
    place = str(folder.absolute()) if folder.is_dir() else str(model)
    name = model_id or (folder.absolute().name if folder.is_dir() else place)
    serving = ServingConfig(**config.model_dump(exclude={"host", "port", "grpc_port"}))
    args = ServeArgs(models={name: place}, serving=serving, drain_s=2, local_only=is_loopback(config.host))
    check_model(place)
    host, port = config.host, config.port or free_port(config.host)
    for taken in (port, config.grpc_port):
        if taken is not None:
            _check_port(host, taken)
    endpoint = Endpoint(f"http://{_reachable(host)}:{port}", name, config.grpc_port)
    with ExitStack() as teardown, connected(cluster):
        from ray import serve

        if serve.status().proxies:
            raise InputError(
                "Ray Serve already runs on this cluster, with an address of its own; deploy there with "
                "`serve deploy` (see serve/config.yaml), or stop it first with `serve shutdown`"
            )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port},
                grpc_options=_grpc_options(config.grpc_port),
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            serve.run(_application(args), name=_APP_NAME, route_prefix="/")
            _wait_ready(endpoint)
            yield endpoint
        finally:
            # Until Ray is gone itself, it reports on stdout that the controller it was told to kill was killed.
            shown = sys.stderr if log.isEnabledFor(logging.DEBUG) else io.StringIO()
            teardown.enter_context(redirect_stdout(shown))
            serve.shutdown()


def serve(
    model: str | Path,
    config: ServingConfig,
    cluster: ClusterConfig,
    on_ready: Callable[[Endpoint], None],
    *,
    model_id: str | None = None,
) -> None:
    """Serve a model until SIGINT or SIGTERM, then shut down and return. To be called in the main thread.

    `on_ready` is called once, when requests are answered.

    Raises:
        InputError, RuntimeError: as `serve_model`.
    """
    stop = threading.Event()
    try:
        with _stop_signals(stop) as started:
            with serve_model(model, config, cluster, model_id=model_id) as endpoint:
                started()
                log.info("serve: %s is served; metrics for Prometheus at %s/metrics", endpoint.model_id, endpoint.url)
                on_ready(endpoint)
                stop.wait()
    except KeyboardInterrupt:
        if not stop.is_set():
            raise


@contextmanager
def _stop_signals(stop: threading.Event) -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM set `stop`; until the yielded function is called they also interrupt the start."""
    starting = True

    def handle(number: int, frame: FrameType | None) -> None:
        first = not stop.is_set()
        stop.set()
        if starting and first:
            raise KeyboardInterrupt

    def install() -> None:
        for number in previous:
            signal.signal(number, handle)

    def started() -> None:
        nonlocal starting
        starting = False
        install()  # again: Ray may have put its own in place

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    install()
    try:
        yield started
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _api_key_hashes() -> tuple[str, ...]:
    keys = [key.strip() for key in os.environ.get(API_KEYS_VARIABLE, "").split(",")]
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys if key)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a closing socket is free
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"port {port} on {host} is in use; choose another with --port"
            else:
                message = f"cannot listen on {host}:{port} ({error.strerror}); choose another host or port"
            raise InputError(message) from None


def _grpc_options(port: int | None) -> dict[str, Any] | None:
    return None if port is None else {"port": port, "grpc_servicer_functions": [SERVICER_FUNCTION]}


def _reachable(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host


def _wait_ready(endpoint: Endpoint) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    last = ""
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{endpoint.url}/ready", timeout=5, trust_env=False)
            if answer.status_code == 200:
                return
            last = f"status {answer.status_code}"
        except httpx.HTTPError as error:
            last = type(error).__name__
        time.sleep(0.1)
    raise RuntimeError(f"{endpoint.url} was not ready after {READY_TIMEOUT_S:.0f} s ({last})")
