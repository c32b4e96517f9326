"""The API in-process, on an engine without a model: what its tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import httpx
import numpy as np
from starlette.types import ASGIApp

from gist_ray.serving.api import create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.gate import Access
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.scheduler import Scheduler
from gist_ray.serving.schema import MAX_BODY_BYTES

OPENAI, TEI = "/v1/embeddings", "/embed"
POSTS = [OPENAI, TEI, "/", "/similarity", "/tokenize"]
JSON = {"content-type": "application/json"}


def serving(
    test: Callable[[httpx.AsyncClient, Scheduler], Awaitable[None]],
    engine: FakeEngine | None = None,
    max_queue_tokens: int = 10_000,
    model_id: str = "org/demo",
    replica: str = "",
    max_body_bytes: int = MAX_BODY_BYTES,
    **access: Any,
) -> None:
    """Run a test against the API."""

    async def run() -> None:
        fake = engine or FakeEngine(prompts={"query": "find "}, max_tokens=64)
        models = Models(lambda place: fake, partial(Scheduler, batch_tokens=1024, max_queue_tokens=max_queue_tokens))
        await models.replace({model_id: "a-place"})
        try:
            app = create_api(models, Measures(models, replica), Access(**access), max_body_bytes=max_body_bytes)
            async with client_of(app) as client:
                await test(client, models.get().scheduler)
        finally:
            await models.close()

    asyncio.run(run())


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


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
