"""Tracing: a span for each request, and one for each phase of it, for OpenTelemetry. Off unless it is configured.

OpenTelemetry's own environment variables say where spans go: `OTEL_EXPORTER_OTLP_ENDPOINT` turns it on, and
`OTEL_SERVICE_NAME`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_TRACES_SAMPLER` mean what they mean elsewhere. A request's
`traceparent` header is honoured. Nothing of a text is told.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from gist_ray.errors import InputError
from gist_ray.serving.outcomes import Embeddings

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Span:
    """Of one request; this one goes nowhere."""

    def ended(self, status: int) -> None:
        """The answer's status."""


class _RealSpan(Span):
    def __init__(self, tracer: Any, span: Any) -> None:
        self.tracer, self.span = tracer, span

    def ended(self, status: int) -> None:
        from opentelemetry.trace import StatusCode

        self.span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self.span.set_status(StatusCode.ERROR)


_current: ContextVar[_RealSpan | None] = ContextVar("gist_ray_span", default=None)


class Tracing:
    """Where spans go, by an OpenTelemetry `TracerProvider`; without one, nowhere."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("gist_ray") if provider else None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Tracing:
        """As the environment says.

        Raises:
            InputError: an endpoint is given, and OpenTelemetry's exporter is not installed.
        """
        if not any(environment.get(name) for name in ENDPOINTS):
            return NO_TRACING
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InputError(
                f"{ENDPOINTS[0]} is set and {error.name} is not installed; `pip install gist-ray[otel]`, or unset it"
            ) from None
        name = environment.get("OTEL_SERVICE_NAME", "gist-ray")
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def flush(self) -> None:
        """Send what has not been sent yet."""
        if self._provider is not None:
            self._provider.force_flush()

    @contextmanager
    def request(self, method: str, route: str, headers: Iterable[tuple[bytes, bytes]]) -> Iterator[Span]:
        """The span of a request, for the length of a `with` block. A `traceparent` among `headers` is its parent."""
        if self._tracer is None:
            yield _NO_SPAN
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        context = extract({name.decode("latin-1"): value.decode("latin-1") for name, value in headers})
        attributes = {"http.request.method": method, "http.route": route}
        with self._tracer.start_as_current_span(
            f"{method} {route}", context=context, kind=SpanKind.SERVER, attributes=attributes
        ) as span:
            token = _current.set(real := _RealSpan(self._tracer, span))
            try:
                yield real
            finally:
                _current.reset(token)


NO_TRACING = Tracing()
_NO_SPAN = Span()


def trace_phases(model_id: str, found: Embeddings, serialize_s: float) -> None:
    """Spans below the request's, for where its time went; they are known afterwards, so they end now."""
    current = _current.get()
    if current is None:
        return
    attributes = {"gist_ray.model": model_id, "gist_ray.texts": len(found.vectors), "gist_ray.tokens": found.num_tokens}
    current.span.set_attributes(attributes)
    seconds = {
        "tokenize": found.tokenize_s,
        "queue": found.queue_s,
        "forward": found.forward_s,
        "serialize": serialize_s,
    }
    at_ns = time.time_ns() - int(1e9 * sum(seconds.values()))
    for name, value in seconds.items():
        until_ns = at_ns + int(1e9 * value)
        current.tracer.start_span(name, start_time=at_ns).end(until_ns)
        at_ns = until_ns
