"""API: the HTTP contract over the models of a replica. Knows nothing of Ray, and runs in-process under any ASGI client.

Texts are never logged and never repeated in an error.
"""

from __future__ import annotations

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
from gist_ray.serving.gate import Access, Endpoint, Gate, on_error
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.outcomes import Closed
from gist_ray.serving.pieces import Piece
from gist_ray.serving.routes import BYTES, Routes
from gist_ray.serving.tracing import NO_TRACING, Tracing


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
    app.get("/", response_class=HTMLResponse)(routes.home)
    app.get("/v1/models")(routes.model_list)
    app.get("/info")(routes.info)
    app.get("/health")(routes.health)
    app.get("/ready", responses={503: {"model": schema.ErrorResponse}}, response_model=None)(routes.ready)
    app.get("/metrics", response_class=Response)(routes.metrics)
    busy = {
        "/v1/embeddings": routes.openai_embeddings,
        "/embed": routes.tei_embed,
        "/": routes.tei_embed,
        "/similarity": routes.similarity,
        "/tokenize": routes.tokenize,
    }
    paths = frozenset(app.openapi()["paths"])
    app.gate = Gate(super(Api, app).__call__, access, busy, paths, measures, tracing)
    for kind in (ApiError, HTTPException, Closed, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    return on_error(request, error)


def _add_post(
    app: FastAPI, path: str, endpoint: Endpoint, asked: type[BaseModel], answered: Any, *, raw: bool = False
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
