"""Body: a request's bytes, read within limits, as a validated question. An error never repeats a text."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from gist_ray.serving.api_error import ApiError, field_error

DISCARD_FACTOR = 8
"""A body over the limit is read and thrown away, up to so many limits: most clients read an answer only when
they have sent everything."""

Model = TypeVar("Model", bound=BaseModel)


async def parsed(request: Request, model: type[Model], limit: int) -> Model:
    """The body of at most `limit` bytes as `model`.

    Raises:
        ApiError: 400 not JSON, 413 too large, 400, 413 or 422 for a field.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, "the body must be JSON: send the header `Content-Type: application/json`")
    tree = _decoded(await _read(request, limit))
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise field_error(error) from None


async def _read(request: Request, limit: int) -> bytes:
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
    try:
        tree = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # also bad UTF-8, endless integers, deep nesting
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error
        raise ApiError(400, f"the body is not valid JSON: {reason}") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "the body must be a JSON object")
    return tree


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
