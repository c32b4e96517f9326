"""API errors: every way in which a request can fail, as a status and the OpenAI error object. None repeats a text."""

from __future__ import annotations

import json
import logging

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from gist_ray.serving.outcomes import Closed, ForwardFailed, Overloaded, RequestTooLarge, TextTooLong, UnknownModel

log = logging.getLogger(__name__)

STATUS_OF_PROBLEM = {"empty_input": 400, "token_ids": 400, "too_many_texts": 413}
"""Our own validation problems that are not 422."""
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 2xx. `param` is the field at fault, `code` a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}


def error_response(error: ApiError) -> Response:
    """The OpenAI error object, in ASCII: a message may quote a field name that is no Unicode."""
    kind = "server_error" if error.status >= 500 else _KINDS.get(error.status, "invalid_request_error")
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    text = json.dumps({"error": body})
    return Response(text, status_code=error.status, headers=error.headers, media_type="application/json")


def field_error(error: ValidationError) -> ApiError:
    """The first problem, with the place where it is; never the value."""
    problem = error.errors(include_input=False, include_url=False)[0]
    param = ".".join(str(part) for part in problem["loc"])[:100]
    if problem["type"] == "extra_forbidden":
        message = f"`{param}` is not a field of this request; see /docs for those there are"
    elif problem["type"] == "missing":
        message = f"`{param}` is missing"
    else:
        message = f"`{param}`: {problem['msg']}"
    return ApiError(STATUS_OF_PROBLEM.get(problem["type"], 422), message, param=param, code=problem["type"])


def as_api_error(error: Exception, texts_field: str) -> ApiError:
    """Any exception; a fault of ours is logged here. `texts_field` is what the route calls its texts."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        answer = ApiError(error.status_code, f"{error.detail}: see /docs for the routes")
        answer.headers = dict(error.headers or {})
    elif isinstance(error, UnknownModel):
        answer = ApiError(404, str(error), param="model", code="model_not_found")
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
    elif isinstance(error, ForwardFailed):  # the scheduler has logged it
        answer = ApiError(500, str(error), code="internal_error")
    else:
        log.error("a request failed", exc_info=error)
        answer = ApiError(500, "internal error; see the server's log", code="internal_error")
    return answer
