"""API: the HTTP contract over a scheduler. Knows nothing of Ray, and runs in-process under any ASGI client.

Texts are never logged and never repeated in an error.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gist_ray.serving import schema
from gist_ray.serving.engine import Engine, Vectors
from gist_ray.serving.scheduler import (
    Closed,
    Embeddings,
    ForwardFailed,
    Overloaded,
    RequestTooLarge,
    Scheduler,
    TextTooLong,
)
from gist_ray.serving.schema import ApiError

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Need no API key: a load balancer asks them."""
ROWS_PER_TURN = 64
"""Vectors written as JSON before other requests get a turn."""
DISCARD_FACTOR = 8
"""A body over the limit is read and thrown away, up to so many limits: most clients read an answer only when
they have sent everything."""

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class ApiSettings:
    """What the API needs beside the engine.

    Attributes:
        model_id: the name under which the model is served.
        api_key_sha256: hex digests of the accepted keys; empty: no key is asked for.
        max_body_bytes: largest request body.
        replica: label of the metrics, so that several replicas behind one address stay apart.
    """

    model_id: str
    api_key_sha256: tuple[str, ...] = ()
    max_body_bytes: int = schema.MAX_BODY_BYTES
    replica: str = ""


def create_api(engine: Engine, scheduler: Scheduler, settings: ApiSettings) -> FastAPI:
    """The ASGI application. The caller starts, warms and closes the scheduler."""
    app = FastAPI(
        title="gist-ray",
        version=version("gist-ray"),
        redoc_url=None,
        redirect_slashes=False,
        description=f"Embeddings of `{settings.model_id}`: OpenAI and text-embeddings-inference routes.",
    )
    routes = _Routes(engine, scheduler, settings)
    _add_post(app, "/v1/embeddings", routes.openai_embeddings, schema.OpenAIRequest, schema.OpenAIResponse)
    _add_post(app, "/embed", routes.tei_embed, schema.TeiRequest, list[list[float]])
    _add_post(app, "/", routes.tei_embed, schema.TeiRequest, list[list[float]])
    app.get("/v1/models")(routes.models)
    app.get("/info")(routes.info)
    app.get("/health")(routes.health)
    app.get("/ready", responses={503: {"model": schema.ErrorResponse}}, response_model=None)(routes.ready)
    app.get("/metrics", response_class=Response)(routes.metrics)
    paths = frozenset(app.openapi()["paths"])
    app.add_middleware(_Gate, settings=settings, paths=paths, answers=routes.answers)
    for kind in (ApiError, HTTPException, Overloaded, RequestTooLarge, TextTooLong, ForwardFailed, Closed):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_error)
    app.add_exception_handler(Exception, _on_error)
    return app


class _Routes:
    """The endpoints, over one engine and scheduler."""

    def __init__(self, engine: Engine, scheduler: Scheduler, settings: ApiSettings) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.settings = settings
        self.created = int(time.time())
        self.answers: Counter[tuple[str, int]] = Counter()
        self.serialize_seconds = 0.0

    async def openai_embeddings(self, request: Request) -> Response:
        """Embed texts, as OpenAI."""
        asked = await self._parse(request, schema.OpenAIRequest)
        if asked.model not in (None, self.settings.model_id):
            raise ApiError(
                404,
                f"the model is not served here; the one served is `{self.settings.model_id}`",
                param="model",
                code="model_not_found",
            )
        found = await self._embed(asked.input, asked.prompt_name, asked.truncate, asked.dimensions, unit=True)
        started = time.perf_counter()
        encode = _base64_row if asked.encoding_format == "base64" else _float_row
        rows = await _written(found.vectors, encode)
        data = ",".join(f'{{"object":"embedding","index":{index},"embedding":{row}}}' for index, row in enumerate(rows))
        usage = {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens}
        tail = json.dumps({"model": self.settings.model_id, "usage": usage})[1:]
        self.serialize_seconds += time.perf_counter() - started
        return _json_response(f'{{"object":"list","data":[{data}],{tail}')

    async def tei_embed(self, request: Request) -> Response:
        """Embed texts, as text-embeddings-inference: a list of vectors, also for a single text."""
        asked = await self._parse(request, schema.TeiRequest)
        truncate, unit = asked.truncate is not False, asked.normalize is not False
        found = await self._embed(asked.inputs, asked.prompt_name, truncate, asked.dimensions, unit=unit)
        started = time.perf_counter()
        rows = await _written(found.vectors, _float_row)
        self.serialize_seconds += time.perf_counter() - started
        return _json_response(f"[{','.join(rows)}]")

    async def models(self) -> schema.ModelList:
        """The one served model."""
        card = schema.ModelCard(id=self.settings.model_id, object="model", created=self.created, owned_by="gist-ray")
        return schema.ModelList(object="list", data=[card])

    async def info(self) -> schema.Info:
        """What is served and its limits."""
        return schema.Info(
            model_id=self.settings.model_id,
            model_dtype="float32",
            max_input_length=self.engine.max_tokens,
            max_batch_tokens=self.scheduler.batch_tokens,
            max_client_batch_size=schema.MAX_TEXTS,
            auto_truncate=True,
            version=version("gist-ray"),
            dim=self.engine.dim,
            prompts=sorted(self.engine.prompts),
        )

    async def health(self) -> dict[str, str]:
        """Live: the process answers."""
        return {"status": "ok"}

    async def ready(self) -> dict[str, str]:
        """Ready: the model is warm and requests are taken."""
        if not self.scheduler.ready:
            raise ApiError(503, "the model is not ready yet", code="not_ready")
        return {"status": "ready"}

    async def metrics(self) -> Response:
        """Prometheus text."""
        return Response(
            _metrics_text(self.scheduler, self.answers, self.serialize_seconds, self.settings),
            media_type="text/plain; version=0.0.4",
        )

    async def _parse(self, request: Request, model: type[Model]) -> Model:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(400, "the body must be JSON: send the header `Content-Type: application/json`")
        tree = _decoded(await _body(request, self.settings.max_body_bytes))
        try:
            return model.model_validate(tree)
        except ValidationError as error:
            raise _field_error(error) from None

    async def _embed(
        self, texts: list[str], prompt_name: str | None, truncate: bool, dimensions: int | None, *, unit: bool
    ) -> Embeddings:
        if prompt_name is not None and prompt_name not in self.engine.prompts:
            known = ", ".join(sorted(self.engine.prompts)) or "none"
            message = f"`prompt_name` is no prompt of this model; it has: {known}"
            raise ApiError(422, message, param="prompt_name")
        if dimensions is not None and dimensions > self.engine.dim:
            raise ApiError(422, f"`dimensions` is above the model's {self.engine.dim}", param="dimensions")
        prompt = self.engine.prompts[prompt_name] if prompt_name is not None else ""
        found = await self.scheduler.embed(texts, prompt=prompt, truncate=truncate)
        if dimensions is None:
            return found
        return Embeddings(cut(found.vectors, dimensions, unit=unit), found.num_tokens)


def cut(vectors: Vectors, dimensions: int, *, unit: bool = True) -> Vectors:
    """The first `dimensions` numbers of each row of `[n, dim]`; then, if `unit`, rows of length 1 again."""
    short = vectors[:, :dimensions]
    if unit:
        short = short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(short, dtype=np.float32)


def _add_post(
    app: FastAPI,
    path: str,
    endpoint: Callable[[Request], Awaitable[Response]],
    asked: type[BaseModel],
    answered: Any,
) -> None:
    """A route that reads its own body, so that limits and errors are ours; the schemas are for `/docs`."""
    body = {"required": True, "content": {"application/json": {"schema": asked.model_json_schema()}}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": schema.ErrorResponse} for status in (400, 401, 404, 413, 422, 429, 500, 503)
    }
    app.post(
        path,
        response_model=None,
        responses={200: {"model": answered}, **errors},
        openapi_extra={"requestBody": body},
    )(endpoint)


async def _body(request: Request, limit: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > DISCARD_FACTOR * limit:
            break
    if size > limit:
        raise ApiError(413, f"the body is over {limit} bytes; split the request")
    return b"".join(chunks)


def _decoded(body: bytes) -> Any:
    """JSON of a body; NaN and infinity, which Python would accept, are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        tree = json.loads(body.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # also bad UTF-8, endless integers, deep nesting
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error
        raise ApiError(400, f"the body is not valid JSON: {reason}") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "the body must be a JSON object")
    return tree


def _field_error(error: ValidationError) -> ApiError:
    """The first problem, with the place where it is; never the value."""
    problem = error.errors(include_input=False, include_url=False)[0]
    param = ".".join(str(part) for part in problem["loc"])[:100]
    if problem["type"] == "extra_forbidden":
        message = f"`{param}` is not a field of this request; see /docs for those there are"
    elif problem["type"] == "missing":
        message = f"`{param}` is missing"
    else:
        message = f"`{param}`: {problem['msg']}"
    status = schema.STATUS_OF_PROBLEM.get(problem["type"], 422)
    return ApiError(status, message, param=param, code=problem["type"])


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
    """ASGI middleware: asks for the API key, and counts answers by route and status."""

    def __init__(
        self, app: ASGIApp, settings: ApiSettings, paths: frozenset[str], answers: Counter[tuple[str, int]]
    ) -> None:
        self.app = app
        self.digests = [digest.encode() for digest in settings.api_key_sha256]
        self.paths = paths
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers[route, message["status"]] += 1
            await send(message)

        if scope["path"] not in OPEN_PATHS and not self._admits(scope):
            message = "give a valid API key in the header `Authorization: Bearer KEY`"
            error = ApiError(401, message, code="invalid_api_key")
            refusal = _json_response(schema.error_text(error), 401, {"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

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


async def _written(vectors: Vectors, encode: Callable[[Vectors], str]) -> list[str]:
    rows: list[str] = []
    for start in range(0, len(vectors), ROWS_PER_TURN):
        if start:
            await asyncio.sleep(0)
        rows += [encode(row) for row in vectors[start : start + ROWS_PER_TURN]]
    return rows


def _float_row(row: Vectors) -> str:
    return json.dumps(row.tolist(), separators=(",", ":"))


def _base64_row(row: Vectors) -> str:
    return f'"{base64.b64encode(row.astype("<f4").tobytes()).decode()}"'


def _metrics_text(
    scheduler: Scheduler, answers: Counter[tuple[str, int]], serialize_seconds: float, settings: ApiSettings
) -> str:
    """Sums per field of Counters, answers per route and status, and what a reader would derive from them."""
    counters = asdict(scheduler.counters)
    phases = ("tokenize", "queue", "forward")
    seconds = {phase: counters.pop(f"{phase}_seconds") for phase in phases} | {"serialize": serialize_seconds}
    padded, capacity = counters["padded_tokens"], counters["batches"] * scheduler.batch_tokens
    gauges = {
        "queue_tokens": scheduler.queued_tokens,
        "batch_fill_ratio": padded / capacity if capacity else 0,
        "padding_ratio": 1 - counters["batch_tokens"] / padded if padded else 0,
        "tokens_per_second": scheduler.tokens_per_second,
        "ready": int(scheduler.ready),
    }
    families: list[tuple[str, str, dict[str, float]]] = [
        ("requests_total", "counter", {f'route="{r}",status="{s}"': n for (r, s), n in answers.items()}),
        ("phase_seconds_total", "counter", {f'phase="{phase}"': value for phase, value in seconds.items()}),
        *((f"{name}_total", "counter", {"": value}) for name, value in counters.items()),
        *((name, "gauge", {"": value}) for name, value in gauges.items()),
    ]
    common = f"model={json.dumps(settings.model_id)},replica={json.dumps(settings.replica)}"
    lines = []
    for name, kind, values in families:
        lines.append(f"# TYPE gist_ray_{name} {kind}")
        for label, value in values.items():
            lines.append(f"gist_ray_{name}{{{common}{',' if label else ''}{label}}} {value:.10g}")
    return "\n".join(lines) + "\n"
