"""Who may ask, and how it is told that something went wrong."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Mount

from gist_ray.serving.api import create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.gate import OPEN, Access
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.outcomes import Overloaded
from gist_ray.serving.scheduler import Scheduler
from tests.serving.served import OPENAI, client_of, expect_error, serving


def test_not_ready_until_a_model_is_warm():
    may_load = threading.Event()

    def load(place: str) -> FakeEngine:
        assert may_load.wait(60)
        return FakeEngine()

    async def run() -> None:
        models = Models(load, Scheduler)
        async with client_of(create_api(models, Measures(models, ""), Access())) as client:
            loading = asyncio.create_task(models.replace({"org/demo": "a-place"}))
            await asyncio.sleep(0.05)
            assert (await client.get("/health")).status_code == 200
            assert expect_error(await client.get("/ready"), 503)["type"] == "server_error"
            for path in ("/", "/info"):
                expect_error(await client.get(path), 503)
            expect_error(await client.post(OPENAI, json={"input": "a"}), 503)
            may_load.set()
            await loading
            assert (await client.get("/ready")).status_code == 200
            assert (await client.post(OPENAI, json={"input": "a"})).status_code == 200
            await models.close()
            expect_error(await client.get("/ready"), 503)
            expect_error(await client.post(OPENAI, json={"input": "a"}), 503)

    asyncio.run(run())


def test_unknown_models_routes_and_methods():
    async def test(client, scheduler) -> None:
        error = expect_error(await client.post(OPENAI, json={"input": "a", "model": "gpt"}), 404, "org/demo")
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        expect_error(await client.get("/nothing"), 404)
        expect_error(await client.get(OPENAI), 405)
        expect_error(await client.post("/health"), 405)

    serving(test)


def test_api_keys():
    keys = ("first-key", "zweiter-schlüssel")
    digests = tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)

    async def test(client, scheduler) -> None:
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer"},
            {"authorization": "Bearer no"},
            {"authorization": "first-key"},
            {"authorization": "Basic first-key"},
            {"authorization": f"Bearer {digests[0]}"},
        ):
            for path in (OPENAI, "/metrics", "/docs", "/none"):
                answer = await client.request("POST" if path == OPENAI else "GET", path, headers=headers)
                assert expect_error(answer, 401)["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
        for key in keys:
            headers = {b"authorization": b"bearer " + key.encode()}
            answer = await client.post(OPENAI, json={"input": "a"}, headers=headers)
            assert answer.status_code == 200

    serving(test, api_key_sha256=digests)


def test_below_a_route_prefix():
    """Serve mounts an application at its `route_prefix`."""
    digest = hashlib.sha256(b"key").hexdigest()

    async def run() -> None:
        models = Models(lambda place: FakeEngine(), Scheduler)
        await models.replace({"org/demo": "a-place"})
        measures = Measures(models, "")
        app = create_api(models, measures, Access((digest,)))
        async with client_of(Starlette(routes=[Mount("/canary", app)])) as client:
            key = {"authorization": "Bearer key"}
            assert (await client.get("/canary/ready")).status_code == 200
            assert (await client.get("/canary/")).status_code == 200
            expect_error(await client.post("/canary/embed", json={"inputs": "a"}), 401)
            for path, ask in (("/canary/embed", {"inputs": "a"}), ("/canary/", {"inputs": "a"})):
                assert len((await client.post(path, json=ask, headers=key)).json()) == 1
            error = expect_error(
                await client.post("/canary/v1/embeddings", json={"input": ["a" * 9] * 9999}, headers=key), 413
            )
            assert error["param"] == "input"
            refused = await client.delete("/canary/", headers=key)
            expect_error(refused, 405)
            assert refused.headers["allow"] == "GET, POST"
        assert 'route="/embed",status="200"} 1.0' in measures.text().decode()
        await models.close()

    asyncio.run(run())


def test_overload_says_when_to_come_back(monkeypatch):
    async def test(client, scheduler) -> None:
        async def refuse(*args: Any, **kwargs: Any) -> None:
            raise Overloaded(queued_tokens=900, limit=1000, retry_after_s=7)

        monkeypatch.setattr(scheduler, "embed", refuse)
        answer = await client.post(OPENAI, json={"input": "a"})
        assert expect_error(answer, 429, "900 tokens")["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "7"

    serving(test)


def test_under_overload_every_request_is_answered_or_shed():
    async def test(client, scheduler) -> None:
        asks = [client.post(OPENAI, json={"input": [f"request {i} " + "w " * 20]}) for i in range(40)]
        answers = await asyncio.gather(*asks)
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
        assert scheduler.counters.requests_shed == statuses.count(429)

    serving(test, engine=FakeEngine(delay_s=0.5), max_queue_tokens=200)


def test_a_fault_of_the_engine_is_a_500_without_details(caplog):
    class Broken(FakeEngine):
        broken = ""

        def forward(self, tokens):
            if self.broken == "forward":
                raise RuntimeError("secret detail")
            return super().forward(tokens)

        def tokenize(self, texts, *, prompt="", truncate=True):
            if self.broken == "tokenize":
                raise RuntimeError("secret detail")
            return super().tokenize(texts, prompt=prompt, truncate=truncate)

    async def test(client, scheduler) -> None:
        for scheduler.engine.broken in ("forward", "tokenize"):
            answer = await client.post(OPENAI, json={"input": "private words"})
            assert expect_error(answer, 500)["type"] == "server_error"
            assert "secret" not in answer.text and "private" not in caplog.text
            assert "secret detail" in caplog.text  # for who reads the log
            caplog.clear()

    serving(test, engine=Broken())


def test_the_page_needs_no_key_and_nothing_from_elsewhere():
    digest = hashlib.sha256(b"key").hexdigest()

    async def test(client, scheduler) -> None:
        answer = await client.get("/")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "org/demo&lt;script&gt;" in answer.text and "org/demo<script>" not in answer.text
        assert '<option value="query">' in answer.text
        assert "://" not in answer.text and "$" not in answer.text.replace("${", "")
        expect_error(await client.post("/", json={"inputs": "a"}), 401)

    serving(test, api_key_sha256=(digest,), model_id="org/demo<script>")


def test_only_the_peers_named_are_answered():
    async def test(client, scheduler) -> None:  # httpx says that it is 127.0.0.1
        assert (await client.get("/health")).status_code == 200

    async def refused(client, scheduler) -> None:
        for path in ("/health", "/", "/v1/models"):
            expect_error(await client.get(path), 403)

    serving(test, peers=frozenset({"127.0.0.1"}))
    serving(refused, peers=frozenset({"10.0.0.1"}))


def test_the_access_log_has_no_texts_and_no_keys(caplog):
    digest = hashlib.sha256(b"a-secret-key").hexdigest()

    async def test(client, scheduler) -> None:
        headers = {"authorization": "Bearer a-secret-key"}
        await client.post(OPENAI, json={"input": "private words"}, headers=headers)
        await client.get("/private-path?and=query", headers=headers)

    with caplog.at_level("INFO", logger="gist_ray.serving.gate"):
        serving(test, api_key_sha256=(digest,), access_log=True)
        lines = [record.getMessage() for record in caplog.records if record.name == "gist_ray.serving.gate"]
        assert len(lines) == 2 and re.fullmatch(r"POST /v1/embeddings 200 [0-9.]+ ms 4 tokens", lines[0])
        assert re.fullmatch(r"GET other 404 [0-9.]+ ms 0 tokens", lines[1])
        caplog.clear()
        serving(test, api_key_sha256=(digest,))
        assert not [record for record in caplog.records if record.name == "gist_ray.serving.gate"]


def test_the_api_does_not_need_ray():
    code = "import sys, gist_ray.serving.api; sys.exit('ray' in sys.modules)"
    environment = {**os.environ, "COVERAGE_PROCESS_START": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == 0


def test_the_description_is_whole_and_names_every_answer():
    digest = hashlib.sha256(b"key").hexdigest()

    async def test(client, scheduler) -> None:
        description = (await client.get("/openapi.json", headers={"authorization": "Bearer key"})).json()
        for reference in re.findall(r'"\$ref": ?"([^"]*)"', json.dumps(description)):
            found = description
            for step in reference.removeprefix("#/").split("/"):
                found = found[step]
            assert found["type"] == "object", reference
        error = {"$ref": "#/components/schemas/ErrorResponse"}
        for path, operations in description["paths"].items():
            for method, operation in operations.items():
                is_open = (method.upper(), path) in OPEN
                assert operation.get("security") == (None if is_open else [{"key": []}])
                statuses = {"403"} if is_open else {"401", "403"}
                assert statuses <= operation["responses"].keys(), path
                for status in operation["responses"].keys() - {"200"}:
                    assert operation["responses"][status]["content"] == {"application/json": {"schema": error}}
                if not is_open:
                    expect_error(await client.request(method, path, json={}), 401)

    async def without_keys(client, scheduler) -> None:
        description = (await client.get("/openapi.json")).json()
        assert "securitySchemes" not in description["components"]
        assert not any("security" in operation for path in description["paths"].values() for operation in path.values())

    serving(test, api_key_sha256=(digest,))
    serving(without_keys)


def test_a_wrong_method_is_told_the_right_ones():
    async def test(client, scheduler) -> None:
        for path, methods in (("/", "GET, POST"), (OPENAI, "POST"), ("/health", "GET")):
            answer = await client.delete(path)
            expect_error(answer, 405)
            assert answer.headers["allow"] == methods

    serving(test)
