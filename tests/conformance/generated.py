"""Requests that schemathesis generates from the API's description, and the API in-process to answer them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings

from gist_ray.serving.api import create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.gate import Access
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.scheduler import Scheduler
from tests.serving.served import client_of

MODEL_ID, DIM, PROMPT_NAME = "org/demo", 16, "query"


class Api:
    """The API in-process, on an event loop that runs while a request does."""

    def __init__(self) -> None:
        engine = FakeEngine(dim=DIM, prompts={PROMPT_NAME: "find "}, max_tokens=10_000)
        self._loop = asyncio.new_event_loop()
        self._models = Models(lambda place: engine, lambda engine: Scheduler(engine, batch_tokens=1024))
        self._run(self._models.replace({MODEL_ID: "a-place"}))
        self._client = client_of(create_api(self._models, Measures(self._models, ""), Access()))
        self.description: dict[str, Any] = self._run(self._client.get("/openapi.json")).json()

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._client.aclose())
        self._run(self._models.close())
        self._loop.close()

    def answer(self, case: Any) -> httpx.Response:
        """To a case of schemathesis."""
        asked = case.as_transport_kwargs(base_url="http://test")
        body = {"json": asked["json"]} if "json" in asked else {"content": asked.get("data")}
        return self._run(self._client.request(asked["method"], asked["url"], headers=asked["headers"], **body))

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)


def executed_cases(description: dict[str, Any], path: str, mode: str, count: int, check: Callable[..., None]) -> int:
    """Check `count` requests of one route, the same ones every time; how many were really made.

    `mode` says whether bodies are as described (positive) or not (negative).
    """
    import schemathesis
    from schemathesis.generation import GenerationMode

    operation = schemathesis.openapi.from_dict(description)[path]["POST"]
    executed = 0

    @seed(1)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=GenerationMode(mode)))
    def run(case: Any) -> None:
        nonlocal executed
        executed += 1
        check(case)

    run()
    return executed


def contract_kept(path: str, mode: str, count: int) -> int:
    """The number of requests, at least `count`, that were all answered as described; for a process of its own."""
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    checks = [CHECKS.get_one(name) for name in names]
    with Api() as api:

        def check(case: Any) -> None:
            answer = api.answer(case)
            case.validate_response(answer, checks=checks)
            if mode == "negative":
                assert answer.status_code in (400, 413, 422), case.as_curl_command()

        return executed_cases(api.description, path, mode, count, check)
