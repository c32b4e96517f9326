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

    def __init__(self, models: Models, measures: Measures, access: Access) -> None:
        self._models, self._measures, self._access = models, measures, access

    async def embed(self, message: Any, context: Any) -> Any:
        """An `EmbedResponse` for an `EmbedRequest`. An error is told in the context, with an empty response.

        Raised, it would be logged with its traceback, for each bad request.
        """
        started, status = time.perf_counter(), 200
        try:
            return await self._answer(message, context)
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

    async def _answer(self, message: Any, context: Any) -> Any:
        self._admit(context)
        asked = _parsed(message)
        served = self._models.get(asked.model)
        found = await embedded(served, asked.input, asked.prompt_name, asked.truncate, asked.dimensions)
        started = time.perf_counter()
        rows = as_type(found.vectors, "float")
        response = EmbedResponse(
            vectors=rows.tobytes(), dim=rows.shape[1], num_tokens=found.num_tokens, model=served.model_id
        )
        self._measures.embedded(served.model_id, found, time.perf_counter() - started)
        return response

    def _admit(self, context: Any) -> None:
        # `ipv4:127.0.0.1:50000`, `ipv6:[::1]:50000`
        peer = str(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")
        sent = {str(name).lower(): value for name, value in context.invocation_metadata()}
        if refusal := self._access.refusal(peer, str(sent.get("authorization", "")).encode()):
            raise refusal


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
