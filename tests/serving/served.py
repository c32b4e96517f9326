"""The API in-process, on an engine without a model: what its tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np

from gist_ray.serving.api import ApiSettings, create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.scheduler import Scheduler

OPENAI, TEI = "/v1/embeddings", "/embed"
POSTS = [OPENAI, TEI, "/", "/similarity", "/tokenize"]
JSON = {"content-type": "application/json"}


def serving(
    test: Callable[[httpx.AsyncClient, Scheduler], Awaitable[None]],
    engine: FakeEngine | None = None,
    warm: bool = True,
    max_queue_tokens: int = 10_000,
    **options: Any,
) -> None:
    """Run a test against the API."""

    async def run() -> None:
        model = engine or FakeEngine(prompts={"query": "find "}, max_tokens=64)
        async with Scheduler(model, max_queue_tokens=max_queue_tokens) as scheduler:
            if warm:
                await scheduler.warm_up()
            app = create_api(model, scheduler, ApiSettings(**{"model_id": "org/demo", **options}))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await test(client, scheduler)

    asyncio.run(run())


def expect_error(response: httpx.Response, status: int, contains: str = "") -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    assert contains in error["message"]
    return error


def expected(*texts: str) -> np.ndarray:
    engine = FakeEngine(max_tokens=64)
    return engine.forward(engine.tokenize(texts))
