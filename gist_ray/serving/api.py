"""API: the HTTP contract over a scheduler. Knows nothing of Ray, and runs in-process under any ASGI client.

Texts are never logged and never repeated in an error.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gist_ray.serving import schema
from gist_ray.serving.engine import Engine
from gist_ray.serving.measures import Measures
from gist_ray.serving.outcomes import Closed, ForwardFailed, Overloaded, RequestTooLarge, TextTooLong
from gist_ray.serving.pieces import Piece
from gist_ray.serving.routes import BYTES, Routes
from gist_ray.serving.scheduler import Scheduler
from gist_ray.serving.schema import ApiError

log = logging.getLogger(__name__)

OPEN = frozenset({("GET", "/"), ("GET", "/health"), ("GET", "/ready")})
"""Need no API key: a load balancer asks them, and the page, which holds no secret, has a field for the key."""


@dataclass(frozen=True)
class ApiSettings:
    """What the API needs beside the engine.

    Attributes:
        model_id: the name under which the model is served.
        api_key_sha256: hex digests of the accepted keys; empty: no key is asked for.
        max_body_bytes: largest request body.
        replica: label of the metrics, so that several replicas behind one address stay apart.
        peers: addresses that may connect; empty: all. A replica behind a proxy listens on every interface.
        access_log: a line for each answer: method, route, status, milliseconds, tokens; no text, no key.
    """

    model_id: str
    api_key_sha256: tuple[str, ...] = ()
    max_body_bytes: int = schema.MAX_BODY_BYTES
    replica: str = ""
    peers: frozenset[str] = frozenset()
    access_log: bool = False


def create_api(engine: Engine, scheduler: Scheduler, settings: ApiSettings) -> FastAPI:
    """The ASGI application. The caller starts, warms and closes the scheduler."""
    app = FastAPI(
        title="gist-ray",
        version=version("gist-ray"),
        redoc_url=None,
        redirect_slashes=False,
        description=f"Embeddings of `{settings.model_id}`: OpenAI and text-embeddings-inference routes.",
    )
    measures = Measures(scheduler, settings.model_id, settings.replica)
    routes = Routes(engine, scheduler, measures, settings.model_id, settings.max_body_bytes, int(time.time()))
    _add_post(app, "/v1/embeddings", routes.openai_embeddings, schema.OpenAIRequest, schema.OpenAIResponse, raw=True)
    _add_post(app, "/embed", routes.tei_embed, schema.TeiRequest, list[list[float]], raw=True)
    _add_post(app, "/", routes.tei_embed, schema.TeiRequest, list[list[float]], raw=True)
    _add_post(app, "/similarity", routes.similarity, schema.SimilarityRequest, list[float])
    _add_post(app, "/tokenize", routes.tokenize, schema.TokenizeRequest, list[list[Piece]])
    app.get("/", response_class=HTMLResponse)(routes.home)
    app.get("/v1/models")(routes.models)
    app.get("/info")(routes.info)
    app.get("/health")(routes.health)
    app.get("/ready", responses={503: {"model": schema.ErrorResponse}}, response_model=None)(routes.ready)
    app.get("/metrics", response_class=Response)(routes.metrics)
    paths = frozenset(app.openapi()["paths"])
    app.add_middleware(_Gate, settings=settings, paths=paths, measures=measures)
    for kind in (ApiError, HTTPException, Overloaded, RequestTooLarge, TextTooLong, ForwardFailed, Closed):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_error)
    app.add_exception_handler(Exception, _on_error)
    return app


def _add_post(
    app: FastAPI,
    path: str,
    endpoint: Callable[[Request], Awaitable[Response]],
    asked: type[BaseModel],
    answered: Any,
    *,
    raw: bool = False,
) -> None:
    """A route that reads its own body, so that limits and errors are ours; the schemas are for `/docs`.

    `raw`: it can answer in bytes too.
    """
    body = {"required": True, "content": {"application/json": {"schema": asked.model_json_schema()}}}
    found: dict[str, Any] = {"model": answered}
    if raw:
        found["content"] = {BYTES: {"schema": {"type": "string", "format": "binary"}}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": schema.ErrorResponse} for status in (400, 401, 403, 404, 413, 422, 429, 500, 503)
    }
    app.post(
        path,
        response_model=None,
        responses={200: found, **errors},
        openapi_extra={"requestBody": body},
    )(endpoint)


async def _on_error(request: Request, error: Exception) -> Response:
    """Every error as the OpenAI error object."""
    answer = _as_api_error(error, "input" if request.url.path.startswith("/v1/") else "inputs")
    return _json_response(schema.error_text(answer), answer.status, answer.headers)


def _as_api_error(error: Exception, texts_field: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        answer = ApiError(error.status_code, f"{error.detail}: see /docs for the routes")
        answer.headers = dict(error.headers or {})
    elif isinstance(error, Overloaded):
        answer = ApiError(429, str(error), code="overloaded")
        answer.headers = {"Retry-After": str(error.retry_after_s)}
    elif isinstance(error, RequestTooLarge):
        answer = ApiError(413, str(error), param=texts_field, code="request_too_large")
    elif isinstance(error, TextTooLong):
        answer = ApiError(422, str(error), param=texts_field, code="text_too_long")
    elif isinstance(error, Closed):
        answer = ApiError(503, str(error), code="not_ready")
    elif isinstance(error, ClientDisconnect):
        answer = ApiError(400, "the connection ended before the body did")
    else:  # a fault of ours
        message = str(error) if isinstance(error, ForwardFailed) else "internal error; see the server's log"
        answer = ApiError(500, message, code="internal_error")
    return answer


class _Gate:
    """ASGI middleware: asks who it is and for the API key, counts and times answers by route and status."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, paths: frozenset[str], measures: Measures) -> None:
        self.app = app
        self.digests = [digest.encode() for digest in settings.api_key_sha256]
        self.paths, self.measures = paths, measures
        self.peers, self.access_log = settings.peers, settings.access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, tokens = time.perf_counter(), 500, b"0"

        async def noted(message: Message) -> None:
            nonlocal status, tokens
            if message["type"] == "http.response.start":
                status = message["status"]
                tokens = dict(message["headers"]).get(b"x-prompt-tokens", b"0")
            await send(message)

        try:
            if refusal := self._refusal(scope):
                await refusal(scope, receive, noted)
            else:
                await self.app(scope, receive, noted)
        finally:
            route, seconds = scope["path"] if scope["path"] in self.paths else "other", time.perf_counter() - started
            self.measures.answered(route, status, seconds)
            if self.access_log:
                log.info("%s %s %d %.1f ms %s tokens", scope["method"], route, status, 1e3 * seconds, tokens.decode())

    def _refusal(self, scope: Scope) -> Response | None:
        """An answer to who may not ask."""
        if self.peers and (scope.get("client") or ("", 0))[0] not in self.peers:
            error = ApiError(403, "this server answers its own machine only; to be reached, start it on another --host")
            return _json_response(schema.error_text(error), 403)
        if (scope["method"], scope["path"]) in OPEN or self._admits(scope):
            return None
        message = "give a valid API key in the header `Authorization: Bearer KEY`"
        error = ApiError(401, message, code="invalid_api_key")
        return _json_response(schema.error_text(error), 401, {"WWW-Authenticate": "Bearer"})

    def _admits(self, scope: Scope) -> bool:
        if not self.digests:
            return True
        value: bytes = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = value.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).hexdigest().encode()
        # Every digest is compared, each in constant time: the time taken says nothing about the keys.
        return any([hmac.compare_digest(digest, known) for known in self.digests])


def _json_response(text: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(text, status_code=status, headers=headers, media_type="application/json")
