"""The gRPC method: the same questions and answers as `/v1/embeddings`, vectors as bytes."""

from __future__ import annotations

import time
from typing import Any

import grpc
from pydantic import ValidationError

from gist_ray.serving import schema
from gist_ray.serving.answers import as_type
from gist_ray.serving.api_error import as_api_error, field_error
from gist_ray.serving.gate import Access
from gist_ray.serving.grpc_messages import EmbedResponse
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.routes import embedded
from gist_ray.serving.tracing import NO_TRACING, Tracing, trace_phases

ROUTE = "grpc:Embed"
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


class GrpcRoute:
    """`gist_ray.v1.Embeddings/Embed`."""

    def __init__(self, models: Models, measures: Measures, access: Access, tracing: Tracing = NO_TRACING) -> None:
        self._models, self._measures, self._access, self._tracing = models, measures, access, tracing

    async def embed(self, message: Any, context: Any) -> Any:
        """An `EmbedResponse` for an `EmbedRequest`. An error is told in the context, with an empty response.

        Raised, Serve would log it with its traceback, for each bad request.
        """
        started, status = time.perf_counter(), 200
        # Values may be bytes, of names that end in `-bin`.
        sent = [(name.encode(), value) for name, value in context.invocation_metadata() if isinstance(value, str)]
        headers = [(name, value.encode()) for name, value in sent]
        with self._tracing.request("gRPC", ROUTE, headers) as span:
            try:
                return await self._answer(message, context.peer(), dict(headers))
            except Exception as error:  # every error has a status
                answer = as_api_error(error, "texts")
                status = answer.status
                context.set_code(_CODES.get(status, grpc.StatusCode.INTERNAL))
                context.set_details(answer.message)
                if answer.headers:
                    context.set_trailing_metadata([(name.lower(), value) for name, value in answer.headers.items()])
                return EmbedResponse()
            finally:
                self._measures.answered(ROUTE, status, time.perf_counter() - started)
                span.ended(status)

    async def _answer(self, message: Any, peer: str, headers: dict[bytes, bytes]) -> Any:
        # `ipv4:127.0.0.1:50000`, `ipv6:[::1]:50000`
        address = peer.partition(":")[2].rpartition(":")[0].strip("[]")
        if refusal := self._access.refusal(address, headers.get(b"authorization", b"")):
            raise refusal
        asked = _parsed(message)
        served = self._models.get(asked.model)
        found = await embedded(served, asked.input, asked.prompt_name, asked.truncate, asked.dimensions)
        started = time.perf_counter()
        rows = as_type(found.vectors, "float")
        response = EmbedResponse(
            vectors=rows.tobytes(), dim=rows.shape[1], num_tokens=found.num_tokens, model=served.model_id
        )
        serialize_s = time.perf_counter() - started
        self._measures.embedded(served.model_id, found, serialize_s)
        trace_phases(served.model_id, found, serialize_s)
        return response


def _parsed(message: Any) -> schema.OpenAIRequest:
    """The message within the limits of the HTTP route.

    Raises:
        ApiError: 400, 413 or 422, as `/v1/embeddings`.
    """
    given = {name: getattr(message, name) for name in ("model", "prompt_name", "truncate", "dimensions")}
    tree = {name: value for name, value in given.items() if message.HasField(name)}
    try:
        return schema.OpenAIRequest.model_validate({"input": list(message.texts), **tree})
    except ValidationError as error:
        raise field_error(error) from None
