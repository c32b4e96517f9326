"""Gate: what every request passes: who asks, with which key, how long it took; and the short way to the busy routes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gist_ray.serving.api_error import ApiError, as_api_error, error_response
from gist_ray.serving.measures import Measures
from gist_ray.serving.tracing import Tracing

log = logging.getLogger(__name__)

OPEN = frozenset({("GET", "/"), ("GET", "/health"), ("GET", "/ready")})
"""Need no API key: a load balancer asks them, and the page, which holds no secret, has a field for the key."""

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Access:
    """Who may ask, and what is written down of it.

    Attributes:
        api_key_sha256: hex digests of the accepted keys; empty: no key is asked for.
        peers: addresses that may connect; empty: all. A replica behind a proxy listens on every interface.
        access_log: a line for each answer: method, route, status, milliseconds, tokens; no text, no key.
    """

    api_key_sha256: tuple[str, ...] = ()
    peers: frozenset[str] = frozenset()
    access_log: bool = False

    def refusal(self, peer: str, authorization: bytes, *, is_open: bool = False) -> ApiError | None:
        """The answer to who may not ask."""
        if self.peers and peer not in self.peers:
            return ApiError(403, "this server answers its own machine only; to be reached, start it on another --host")
        if is_open or self._admits(authorization):
            return None
        message = "give a valid API key in the header `Authorization: Bearer KEY`"
        error = ApiError(401, message, code="invalid_api_key")
        error.headers = {"WWW-Authenticate": "Bearer"}
        return error

    def _admits(self, authorization: bytes) -> bool:
        if not self.api_key_sha256:
            return True
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).hexdigest()
        # Every digest is compared, each in constant time: the time taken says nothing about the keys.
        return any([hmac.compare_digest(digest, known) for known in self.api_key_sha256])


class Gate:
    """An ASGI application in front of another.

    Args:
        app: the web framework, for the routes that are not busy, unknown ones and the documentation.
        access: who may ask.
        busy: POST routes that are called at once: the framework would take longer than a small forward.
        paths: known routes; others are counted together, since anyone can make up names.
        measures: where answers are counted.
        tracing: where spans go.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        busy: Mapping[str, Handler],
        paths: frozenset[str],
        measures: Measures,
        tracing: Tracing,
    ) -> None:
        self.app, self.access, self.busy, self.paths = app, access, busy, paths
        self.measures, self.tracing = measures, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI call."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, tokens = time.perf_counter(), 500, b"0"
        path = path_below_mount(scope)
        route = path if path in self.paths else "other"

        async def noted(message: Message) -> None:
            nonlocal status, tokens
            if message["type"] == "http.response.start":
                status = message["status"]
                tokens = dict(message["headers"]).get(b"x-prompt-tokens", b"0")
            await send(message)

        with self.tracing.request(scope["method"], route, scope["headers"]) as span:
            try:
                await self._answer(path, scope, receive, noted)
            finally:
                seconds = time.perf_counter() - started
                self.measures.answered(route, status, seconds)
                span.ended(status)
                if self.access.access_log:
                    ms, count = 1e3 * seconds, tokens.decode()
                    log.info("%s %s %d %.1f ms %s tokens", scope["method"], route, status, ms, count)

    async def _answer(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        peer = (scope.get("client") or ("", 0))[0]
        authorization = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        is_open = (scope["method"], path) in OPEN
        if refusal := self.access.refusal(peer, authorization, is_open=is_open):
            await error_response(refusal)(scope, receive, send)
        elif scope["method"] == "POST" and (handler := self.busy.get(path)):
            request = Request(scope, receive)
            try:
                response = await handler(request)
            except Exception as error:
                response = on_error(request, error)
            await response(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def path_below_mount(scope: Scope) -> str:
    """The path below where the application is mounted, its `route_prefix`."""
    path, mounted = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(mounted) :] or "/" if path == mounted or path.startswith(f"{mounted}/") else path


def on_error(request: Request, error: Exception) -> Response:
    """Every error as the OpenAI error object."""
    field = "input" if path_below_mount(request.scope).startswith("/v1/") else "inputs"
    return error_response(as_api_error(error, field))
