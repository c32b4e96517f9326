"""Routes: the endpoints of the HTTP contract, over the models of a replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version

import orjson
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from gist_ray.serving import schema
from gist_ray.serving.answers import OutputType, Rows, as_type, base64_rows, cut, json_rows
from gist_ray.serving.api_error import ApiError
from gist_ray.serving.body import parsed
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models, Served
from gist_ray.serving.outcomes import Embeddings
from gist_ray.serving.page import CONTENT_POLICY, page
from gist_ray.serving.tracing import trace_phases

ROWS_PER_TURN = 256
"""Vectors written as JSON before other requests get a turn: 2.3 ms of 384 dimensions."""
BYTES = "application/octet-stream"


@dataclass(frozen=True)
class Routes:
    """The endpoints."""

    models: Models
    measures: Measures
    max_body_bytes: int

    async def openai_embeddings(self, request: Request) -> Response:
        """Embed texts, as OpenAI."""
        asked = await parsed(request, schema.OpenAIRequest, self.max_body_bytes)
        served = self.models.get(asked.model)
        found = await embedded(served, asked.input, asked.prompt_name, asked.truncate, asked.dimensions)
        if _wants_bytes(request):
            return self._bytes(served, found, asked.output_dtype)
        started = time.perf_counter()
        written = base64_rows if asked.encoding_format == "base64" else json_rows
        rows = await _in_turns(as_type(found.vectors, asked.output_dtype or "float"), written)
        data = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, row) for index, row in enumerate(rows)
        )
        usage = {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens}
        tail = orjson.dumps({"model": served.model_id, "usage": usage})[1:]
        return self._answer(served, b'{"object":"list","data":[%b],%b' % (data, tail), found, started)

    async def tei_embed(self, request: Request) -> Response:
        """Embed texts, as text-embeddings-inference: a list of vectors, also for a single text."""
        asked = await parsed(request, schema.TeiRequest, self.max_body_bytes)
        served = self.models.get(asked.model)
        truncate, unit = asked.truncate is not False, asked.normalize is not False
        found = await embedded(served, asked.inputs, asked.prompt_name, truncate, asked.dimensions, unit=unit)
        if _wants_bytes(request):
            return self._bytes(served, found, asked.output_dtype)
        started = time.perf_counter()
        rows = await _in_turns(as_type(found.vectors, asked.output_dtype or "float"), json_rows)
        return self._answer(served, b"[%b]" % b",".join(rows), found, started)

    async def similarity(self, request: Request) -> Response:
        """Cosine of one text with others, as text-embeddings-inference."""
        asked = await parsed(request, schema.SimilarityRequest, self.max_body_bytes)
        texts = [asked.inputs.source_sentence, *asked.inputs.sentences]
        options = asked.parameters or schema.SimilarityParameters()
        served = self.models.get(asked.model)
        found = await embedded(served, texts, options.prompt_name, options.truncate is not False)
        started = time.perf_counter()
        source, others = found.vectors[0], found.vectors[1:]
        cosines = (others @ source).clip(-1, 1)
        return self._answer(served, orjson.dumps(cosines, option=orjson.OPT_SERIALIZE_NUMPY), found, started)

    async def tokenize(self, request: Request) -> Response:
        """Tokens of texts, as text-embeddings-inference."""
        asked = await parsed(request, schema.TokenizeRequest, self.max_body_bytes)
        served = self.models.get(asked.model)
        prompt = _prompt(served, asked.prompt_name)
        found = await served.scheduler.pieces(asked.inputs, prompt=prompt, special=asked.add_special_tokens)
        return Response(orjson.dumps(found), media_type="application/json")

    async def model_list(self) -> schema.ModelList:
        """The served models; a request that names none gets the first."""
        return schema.ModelList(
            object="list",
            data=[
                schema.ModelCard(id=served.model_id, object="model", created=served.created, owned_by="gist-ray")
                for served in self.models
            ],
        )

    async def info(self) -> schema.Info:
        """The model for requests that name none, and its limits."""
        served = self.models.get()
        return schema.Info(
            model_id=served.model_id,
            model_dtype=served.engine.precision,
            max_input_length=served.engine.max_tokens,
            max_batch_tokens=served.scheduler.batch_tokens,
            max_client_batch_size=schema.MAX_TEXTS,
            auto_truncate=True,
            version=version("gist-ray"),
            dim=served.engine.dim,
            prompts=sorted(served.engine.prompts),
        )

    async def health(self) -> dict[str, str]:
        """Live: the process answers."""
        return {"status": "ok"}

    async def ready(self) -> dict[str, str]:
        """Ready: the models are warm and requests are taken."""
        if not self.models.ready:
            raise ApiError(503, "the model is not ready yet", code="not_ready")
        return {"status": "ready"}

    async def metrics(self) -> Response:
        """Prometheus text."""
        return Response(self.measures.text(), media_type="text/plain; version=0.0.4")

    async def home(self) -> HTMLResponse:
        """A page to try the model on: similarities of texts, and timings."""
        served = self.models.get()
        headers = {"content-security-policy": CONTENT_POLICY}
        return HTMLResponse(page(served.model_id, sorted(served.engine.prompts)), headers=headers)

    def _bytes(self, served: Served, found: Embeddings, kind: OutputType | None) -> Response:
        """The rows' bytes one after the other, and their shape and type in headers."""
        started = time.perf_counter()
        rows = as_type(found.vectors, kind or "float")
        answer = self._answer(served, rows.tobytes(), found, started, BYTES)
        answer.headers["x-embedding-shape"] = ",".join(map(str, rows.shape))
        answer.headers["x-embedding-dtype"] = rows.dtype.name
        return answer

    def _answer(
        self, served: Served, body: bytes, found: Embeddings, started: float, kind: str = "application/json"
    ) -> Response:
        """An answer with its times in milliseconds, under the names of text-embeddings-inference."""
        serialize_s = time.perf_counter() - started
        self.measures.embedded(served.model_id, found, serialize_s)
        trace_phases(served.model_id, found, serialize_s)
        total_s = found.tokenize_s + found.queue_s + found.forward_s + serialize_s
        headers = {
            "x-prompt-tokens": str(found.num_tokens),
            "x-tokenization-time": f"{1e3 * found.tokenize_s:.2f}",
            "x-queue-time": f"{1e3 * found.queue_s:.2f}",
            "x-inference-time": f"{1e3 * found.forward_s:.2f}",
            "x-total-time": f"{1e3 * total_s:.2f}",
        }
        return Response(body, media_type=kind, headers=headers)


async def embedded(
    served: Served,
    texts: list[str],
    prompt_name: str | None,
    truncate: bool,
    dimensions: int | None = None,
    *,
    unit: bool = True,
) -> Embeddings:
    """Vectors of texts by one model, cut to `dimensions` numbers; then of length 1 again if `unit`.

    Raises:
        ApiError: 422, no such prompt or too many dimensions.
        Exception: as `Scheduler.embed`.
    """
    prompt = _prompt(served, prompt_name)
    if dimensions is not None and dimensions > served.engine.dim:
        raise ApiError(422, f"`dimensions` is above the model's {served.engine.dim}", param="dimensions")
    found = await served.scheduler.embed(texts, prompt=prompt, truncate=truncate)
    if dimensions is None:
        return found
    return replace(found, vectors=cut(found.vectors, dimensions, unit=unit))


def _prompt(served: Served, name: str | None) -> str:
    if name is None:
        return ""
    prompts = served.engine.prompts
    if name not in prompts:
        known = ", ".join(sorted(prompts)) or "none"
        raise ApiError(422, f"`prompt_name` is no prompt of this model; it has: {known}", param="prompt_name")
    return prompts[name]


def _wants_bytes(request: Request) -> bool:
    return BYTES in request.headers.get("accept", "")


async def _in_turns(rows: Rows, written: Callable[[Rows], list[bytes]]) -> list[bytes]:
    found: list[bytes] = []
    for start in range(0, len(rows), ROWS_PER_TURN):
        if start:
            await asyncio.sleep(0)
        found += written(rows[start : start + ROWS_PER_TURN])
    return found
