"""Spans, as an OpenTelemetry collector gets them over HTTP."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gist_ray.serving.api import create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.gate import Access
from gist_ray.serving.grpc_messages import EmbedRequest
from gist_ray.serving.grpc_route import GrpcRoute
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.scheduler import Scheduler
from gist_ray.serving.tracing import NO_TRACING, Tracing
from tests.serving.served import OPENAI, client_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Collector(HTTPServer):
    """Takes spans."""

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                self.server.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[ExportTraceServiceRequest] = []

    def spans(self) -> dict[str, Any]:
        return {
            span.name: span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }


@pytest.fixture
def collector():
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_and_its_phases(collector: Collector, monkeypatch):
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("no_proxy", "*")
    tracing = Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_SERVICE_NAME": "mine"})

    async def run() -> None:
        models = Models(lambda place: FakeEngine(delay_s=0.02), Scheduler)
        await models.replace({"org/demo": "a-place"})
        async with client_of(create_api(models, Measures(models, ""), Access(), tracing)) as client:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            answer = await client.post(OPENAI, json={"input": ["private words", "b"]}, headers=headers)
            assert answer.status_code == 200
            assert (await client.post(OPENAI, json={"input": ""})).status_code == 400
            assert (await client.get("/private-path")).status_code == 404
        await models.close()

    asyncio.run(run())
    tracing.flush()
    spans = collector.spans()
    request = next(
        s
        for r in collector.requests
        for s in r.resource_spans[0].scope_spans[0].spans
        if s.parent_span_id.hex() == PARENT
    )
    assert request.name == f"POST {OPENAI}" and request.trace_id.hex() == TRACE
    attributes = {a.key: a.value for a in request.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert (attributes["gist_ray.model"].string_value, attributes["gist_ray.texts"].int_value) == ("org/demo", 2)
    assert attributes["gist_ray.tokens"].int_value == 7
    for name in ("tokenize", "queue", "forward", "serialize"):
        phase = spans[name]
        assert phase.parent_span_id == request.span_id and phase.trace_id == request.trace_id
        assert phase.start_time_unix_nano <= phase.end_time_unix_nano
    assert 0.02e9 <= spans["forward"].end_time_unix_nano - spans["forward"].start_time_unix_nano < 5e9
    assert spans["queue"].end_time_unix_nano == spans["forward"].start_time_unix_nano
    assert "GET other" in spans and b"private" not in b"".join(r.SerializeToString() for r in collector.requests)
    (name,) = [
        a.value.string_value
        for a in collector.requests[0].resource_spans[0].resource.attributes
        if a.key == "service.name"
    ]
    assert name == "mine"


def test_over_grpc_too(collector: Collector, monkeypatch):
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("no_proxy", "*")
    tracing = Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})

    class Context:
        def invocation_metadata(self) -> list[tuple[str, str]]:
            return [("traceparent", f"00-{TRACE}-{PARENT}-01")]

        def peer(self) -> str:
            return "ipv4:127.0.0.1:50000"

    async def run() -> None:
        models = Models(lambda place: FakeEngine(), Scheduler)
        await models.replace({"org/demo": "a-place"})
        route = GrpcRoute(models, Measures(models, ""), Access(), tracing)
        assert (await route.embed(EmbedRequest(texts=["a"]), Context())).dim == 16
        await models.close()

    asyncio.run(run())
    tracing.flush()
    spans = collector.spans()
    request = spans["gRPC grpc:Embed"]
    assert request.trace_id.hex() == TRACE and request.parent_span_id.hex() == PARENT
    assert spans["forward"].parent_span_id == request.span_id


def test_nothing_is_traced_unless_it_is_asked_for():
    assert Tracing.from_environment({}) is NO_TRACING
    assert Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}) is NO_TRACING
