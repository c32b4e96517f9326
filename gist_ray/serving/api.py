"""API: the HTTP contract over the models of a replica. Knows nothing of Ray, and runs in-process under any ASGI client.

Texts are never logged and never repeated in an error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from gist_ray.serving import schema
from gist_ray.serving.api_error import ApiError
from gist_ray.serving.gate import OPEN, Access, Gate, Handler, on_error, path_below_mount
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.outcomes import Closed
from gist_ray.serving.pieces import Piece
from gist_ray.serving.routes import BYTES, Routes
from gist_ray.serving.tracing import NO_TRACING, Tracing

_REFERENCE = "#/components/schemas/{model}"


class Api(FastAPI):
    """The web framework behind the gate: what it does not need itself, it never sees."""

    gate: Gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI call."""
        await self.gate(scope, receive, send)


def create_api(
    models: Models,
    measures: Measures,
    access: Access,
    tracing: Tracing = NO_TRACING,
    max_body_bytes: int = schema.MAX_BODY_BYTES,
) -> Api:
    """The ASGI application. The caller loads and closes the models. Larger bodies than `max_body_bytes` get 413."""
    app = Api(
        title="gist-ray",
        version=version("gist-ray"),
        redoc_url=None,
        redirect_slashes=False,
        description="Embeddings of texts: OpenAI and text-embeddings-inference routes.",
    )
    routes = Routes(models, measures, max_body_bytes)
    vectors = list[list[float]]
    _add_post(app, "/v1/embeddings", routes.openai_embeddings, schema.OpenAIRequest, schema.OpenAIResponse, raw=True)
    _add_post(app, "/embed", routes.tei_embed, schema.TeiRequest, vectors, raw=True)
    _add_post(app, "/", routes.tei_embed, schema.TeiRequest, vectors, raw=True)
    _add_post(app, "/similarity", routes.similarity, schema.SimilarityRequest, list[float])
    _add_post(app, "/tokenize", routes.tokenize, schema.TokenizeRequest, list[list[Piece]])
    app.get("/", response_class=HTMLResponse, responses=_errors(403, 503))(routes.home)
    app.get("/v1/models", responses=_errors(401, 403))(routes.model_list)
    app.get("/info", responses=_errors(401, 403, 503))(routes.info)
    app.get("/health", responses=_errors(403))(routes.health)
    app.get("/ready", responses=_errors(403, 503), response_model=None)(routes.ready)
    app.get("/metrics", response_class=Response, responses=_errors(401, 403))(routes.metrics)
    busy = {
        "/v1/embeddings": routes.openai_embeddings,
        "/embed": routes.tei_embed,
        "/": routes.tei_embed,
        "/similarity": routes.similarity,
        "/tokenize": routes.tokenize,
    }
    described = _described(app, needs_key=bool(access.api_key_sha256))["paths"]
    app.gate = Gate(super(Api, app).__call__, access, busy, frozenset(described), measures, tracing)
    for kind in (ApiError, HTTPException, Closed, Exception):
        app.add_exception_handler(kind, _error_handler(described))
    return app


def _error_handler(described: Mapping[str, Iterable[str]]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """The framework's errors and ours as answers. `described`: path to methods."""

    async def answered(request: Request, error: Exception) -> Response:
        answer = on_error(request, error)
        if answer.status_code == 405 and (methods := described.get(path_below_mount(request.scope))):
            answer.headers["allow"] = ", ".join(sorted(methods)).upper()  # the framework names those of one route
        return answer

    return answered


def _add_post(
    app: FastAPI, path: str, endpoint: Handler, asked: type[BaseModel], answered: Any, *, raw: bool = False
) -> None:
    """A route that reads its own body, so that limits and errors are ours; the schemas are for `/docs`.

    `raw`: it can answer in bytes too.
    """
    body = {"required": True, "content": {"application/json": {"schema": _fields(asked)}}}
    found: dict[str, Any] = {"model": answered}
    if raw:
        found["content"] = {BYTES: {"schema": {"type": "string", "format": "binary"}}}
    app.post(
        path,
        response_model=None,
        responses={200: found, **_errors(400, 401, 403, 404, 413, 422, 429, 500, 503)},
        openapi_extra={"requestBody": body},
    )(endpoint)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `/docs`: a route may answer so."""
    schema_of_all = {"$ref": _REFERENCE.format(model=schema.ErrorResponse.__name__)}
    return {status: {"content": {"application/json": {"schema": schema_of_all}}} for status in statuses}


def _described(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document, which `app` keeps, with what the framework cannot know of bodies and keys."""
    document = app.openapi()
    components = document["components"]
    for part in (schema.SimilarityInputs, schema.SimilarityParameters, schema.ErrorBody, schema.ErrorResponse):
        components["schemas"][part.__name__] = _fields(part)
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if (method.upper(), path) not in OPEN:
                    operation["security"] = [{"key": []}]
    return document


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """Its JSON schema; what that refers to is among the document's components."""
    found = model.model_json_schema(ref_template=_REFERENCE)
    found.pop("$defs", None)
    return found
