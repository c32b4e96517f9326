"""Names that clients send, of models and of paths, are looked up and never opened."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from starlette.types import ASGIApp, Message

from gist_ray.serving.api import create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.gate import Access
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.scheduler import Scheduler
from tests.hostile_names import hostile_names
from tests.openings import openings
from tests.serving.served import OPENAI, client_of


async def status_of(app: ASGIApp, path: str) -> int:
    """Of a GET, with the path as it is: HTTP clients would tidy it up first."""
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [], "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return int(sent[0]["status"])


def test_no_model_and_no_path_that_a_client_names_is_opened(tmp_path: Path, monkeypatch):
    """1,000 of each; a name that leads nowhere is answered with 4xx."""
    secret, cwd = tmp_path / "secret", tmp_path / "cwd"
    (secret / "model").mkdir(parents=True)
    (secret / "config.json").write_text("{}")
    (secret / "model/config.json").write_text("{}")
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    found: list[str] = []

    @settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(name=hostile_names(secret))
    def collect(name: str) -> None:
        found.append(name)

    collect()
    with openings(secret) as opened:
        tried, loaded = asyncio.run(answers(found))
    assert not opened and loaded == ["a-place"]
    assert len(tried) >= 1000
    assert {asked for asked, _ in tried} <= {404, 422}
    assert all(path in (200, 400, 404, 405) for _, path in tried)


async def answers(names: list[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Statuses of each name as a model and as a path, and what was loaded as a model."""
    loaded: list[str] = []

    def load(place: str) -> FakeEngine:
        loaded.append(place)
        return FakeEngine()

    models = Models(load, Scheduler)
    await models.replace({"org/demo": "a-place"})
    app = create_api(models, Measures(models, ""), Access())
    tried = []
    async with client_of(app) as client:
        for name in names:
            asked = await client.post(OPENAI, json={"input": "a", "model": name})
            tried.append((asked.status_code, await status_of(app, f"/{name}")))
    await models.close()
    return tried, loaded
