"""The HTTP contract, in-process, on an engine without a model."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gist_ray.serving.answers import as_type, cut
from gist_ray.serving.api import ApiSettings, create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.scheduler import Overloaded, Scheduler
from gist_ray.serving.schema import MAX_TEXTS

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


def test_openai_shape():
    async def test(client, scheduler) -> None:
        answer = await client.post(OPENAI, json={"model": "org/demo", "input": ["a b", "c"], "user": "me"})
        assert answer.status_code == 200
        body = answer.json()
        assert set(body) == {"object", "data", "model", "usage"}
        assert (body["object"], body["model"]) == ("list", "org/demo")
        assert body["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        assert [item["index"] for item in body["data"]] == [0, 1]
        assert {item["object"] for item in body["data"]} == {"embedding"}
        vectors = np.array([item["embedding"] for item in body["data"]], dtype=np.float32)
        np.testing.assert_array_equal(vectors, expected("a b", "c"))  # float32 survives JSON to the bit
        single = (await client.post(OPENAI, json={"input": "a b"})).json()
        assert len(single["data"]) == 1 and single["data"][0]["embedding"] == body["data"][0]["embedding"]

    serving(test)


def test_base64_is_the_same_little_endian_float32():
    async def test(client, scheduler) -> None:
        ask = {"input": ["a", "b c"], "dimensions": 5}
        plain = (await client.post(OPENAI, json=ask | {"encoding_format": "float"})).json()
        coded = (await client.post(OPENAI, json=ask | {"encoding_format": "base64"})).json()
        for one, other in zip(plain["data"], coded["data"], strict=True):
            decoded = np.frombuffer(base64.b64decode(other["embedding"]), dtype="<f4")
            np.testing.assert_array_equal(decoded, np.array(one["embedding"], dtype=np.float32))

    serving(test)


def test_dimensions_cut_then_normalise():
    async def test(client, scheduler) -> None:
        whole = expected("a b")[0]
        for route, field in ((OPENAI, "input"), (TEI, "inputs")):
            answer = (await client.post(route, json={field: "a b", "dimensions": 4})).json()
            vector = np.array(answer[0] if route == TEI else answer["data"][0]["embedding"])
            np.testing.assert_allclose(vector, whole[:4] / np.linalg.norm(whole[:4]), atol=1e-6)
            assert abs(np.linalg.norm(vector) - 1) < 1e-6
        raw = (await client.post(TEI, json={"inputs": "a b", "dimensions": 4, "normalize": False})).json()
        np.testing.assert_array_equal(np.array(raw[0], dtype=np.float32), whole[:4])
        for bad in (0, -1, 17, 10**30, 1.5, "4", True, [4]):
            error = expect_error(await client.post(OPENAI, json={"input": "a", "dimensions": bad}), 422)
            assert error["param"] == "dimensions"

    serving(test)
    assert np.isfinite(cut(np.eye(3, dtype=np.float32), 1)).all()  # also where the cut leaves only zeros


def test_tei_shape():
    async def test(client, scheduler) -> None:
        for route in (TEI, "/"):
            for inputs in ("a b", ["a b"]):
                body = {"inputs": inputs, "normalize": True, "truncate": True}
                answer = await client.post(route, json=body)
                np.testing.assert_array_equal(np.array(answer.json(), dtype=np.float32), expected("a b"))
        nulls = {"normalize": None, "truncate": None, "prompt_name": None, "truncation_direction": "Right"}
        assert (await client.post(TEI, json={"inputs": ["a", "b"], **nulls})).status_code == 200

    serving(test)


def test_prompts_and_truncation():
    async def test(client, scheduler) -> None:
        prompted = (await client.post(TEI, json={"inputs": "a", "prompt_name": "query"})).json()
        np.testing.assert_array_equal(np.array(prompted, dtype=np.float32), expected("find a"))
        answer = await client.post(OPENAI, json={"input": "a", "prompt_name": "other"})
        assert expect_error(answer, 422, "it has: query")["param"] == "prompt_name"
        long = "w " * 100
        cut_off = (await client.post(OPENAI, json={"input": long})).json()
        assert cut_off["usage"]["total_tokens"] == 64
        for route, field in ((OPENAI, "input"), (TEI, "inputs")):
            answer = await client.post(route, json={field: ["a", long], "truncate": False})
            error = expect_error(answer, 422, "text 1 has 102 tokens and the model reads 64")
            assert error["param"] == field and long not in answer.text

    serving(test)


def test_many_texts_come_back_in_order():
    async def test(client, scheduler) -> None:
        texts = [f"text {i} " + "w " * (i % 30) for i in range(300)]
        answer = (await client.post(OPENAI, json={"input": texts})).json()
        assert [item["index"] for item in answer["data"]] == list(range(300))
        vectors = np.array([item["embedding"] for item in answer["data"]], dtype=np.float32)
        np.testing.assert_array_equal(vectors, expected(*texts))

    serving(test)


def test_models_info_health_ready_docs():
    async def test(client, scheduler) -> None:
        models = (await client.get("/v1/models")).json()
        assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["org/demo"]
        info = (await client.get("/info")).json()
        assert info["model_id"] == "org/demo" and info["max_input_length"] == 64 and info["dim"] == 16
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).json() == {"status": "ready"}
        assert (await client.get("/docs")).status_code == 200
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert set(paths) >= {
            OPENAI,
            TEI,
            "/",
            "/similarity",
            "/tokenize",
            "/v1/models",
            "/info",
            "/health",
            "/ready",
            "/metrics",
        }
        for route in (OPENAI, TEI, "/"):
            assert "400" in paths[route]["post"]["responses"]
            assert paths[route]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]

    serving(test)


def test_not_ready_until_warm():
    async def test(client, scheduler) -> None:
        assert (await client.get("/health")).status_code == 200
        assert expect_error(await client.get("/ready"), 503)["type"] == "server_error"
        await scheduler.warm_up()
        assert (await client.get("/ready")).status_code == 200
        await scheduler.close()
        expect_error(await client.get("/ready"), 503)
        expect_error(await client.post(OPENAI, json={"input": "a"}), 503)

    serving(test, warm=False)


BODIES = [
    (b"", 400),
    (b"{", 400),
    (b"null", 400),
    (b"[]", 400),
    (b'"text"', 400),
    (b"7", 400),
    (b'{"input": NaN}', 400),
    (b'{"input": "a", "dimensions": Infinity}', 400),
    (b'{"input": "a", "dimensions": -Infinity}', 400),
    (b'{"input": "\xff"}', 400),
    (b'{"input": "a", "dimensions": ' + b"9" * 5000 + b"}", 400),
    (b'{"input": "a", "dimensions": ' + b"9" * 4000 + b"}", 422),
    (b'{"input": "a", "dimensions": 1e400}', 422),
    (b'{"input": ' + b"[" * 100_000, 400),
    (b"[" * 100_000 + b"]" * 100_000, 400),
    (b'{"input": ' + b"[" * 400 + b"]" * 400 + b"}", 422),
    (b'{"input": "\\ud800"}', 422),
    (b'{"input": ["ok", "\\udc00 x"]}', 422),
    (b'{"input": "a", "\\ud800": 1}', 422),
    (b'{"input": "a", "model": "\\ud800"}', 404),
    (b'{"input": "a", "prompt_name": "\\ud800"}', 422),
    (b'{"\\u0000": "a"}', 422),
    (b"{}", 422),
    (b'{"inputs": "a"}', 422),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=[body[:40] for body, _ in BODIES])
def test_malformed_bodies(body, status):
    async def test(client, scheduler) -> None:
        expect_error(await client.post(OPENAI, content=body, headers=JSON), status)

    serving(test)


FIELDS: list[tuple[dict[str, Any], int, str]] = [
    ({"input": ""}, 400, "empty"),
    ({"input": []}, 400, "empty"),
    ({"input": ["a", ""]}, 400, "index 1"),
    ({"input": [1, 2]}, 400, "check_embedding_ctx_length=False"),
    ({"input": [[1, 2], [3]]}, 400, "check_embedding_ctx_length=False"),
    ({"input": None}, 422, ""),
    ({"input": 5}, 422, ""),
    ({"input": True}, 422, ""),
    ({"input": {}}, 422, ""),
    ({"input": ["a", None]}, 422, "item 1"),
    ({"input": ["a", True]}, 422, "item 1"),
    ({"input": [["a"]]}, 422, ""),
    ({"input": [[]]}, 422, ""),
    ({"input": [1.5]}, 422, ""),
    ({"input": ["a"] * (MAX_TEXTS + 1)}, 413, "split"),
    ({"input": "a", "model": 3}, 422, ""),
    ({"input": "a", "encoding_format": "hex"}, 422, "base64"),
    ({"input": "a", "truncate": "no"}, 422, ""),
    ({"input": "a", "prompt_name": 1}, 422, ""),
    ({"input": "a", "dimension": 4}, 422, "`dimension` is not a field"),
    ({"input": [f"{i} " + "w " * 70 for i in range(200)]}, 413, "split it"),
]


@pytest.mark.parametrize(("body", "status", "contains"), FIELDS, ids=[str(f[0])[:40] for f in FIELDS])
def test_bad_fields(body, status, contains):
    async def test(client, scheduler) -> None:
        expect_error(await client.post(OPENAI, json=body), status, contains)
        other = {("inputs" if key == "input" else key): value for key, value in body.items()}
        if not {"model", "encoding_format"} & body.keys():
            expect_error(await client.post(TEI, json=other), status, contains)

    serving(test)


def test_unknown_models_routes_and_methods():
    async def test(client, scheduler) -> None:
        error = expect_error(await client.post(OPENAI, json={"input": "a", "model": "gpt"}), 404, "org/demo")
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        expect_error(await client.get("/nothing"), 404)
        expect_error(await client.get(OPENAI), 405)
        expect_error(await client.post("/health"), 405)

    serving(test)


def test_content_types():
    async def test(client, scheduler) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; x=y", ""):
            answer = await client.post(OPENAI, content=b'{"input": "a"}', headers={"content-type": kind})
            expect_error(answer, 400, "application/json")
        for headers in ({}, {"content-type": "application/json; charset=utf-8"}):
            answer = await client.post(OPENAI, content=b'{"input": "a"}', headers=headers)
            assert answer.status_code == 200
        answer = await client.post(OPENAI, content=b'\xef\xbb\xbf{"input": "a"}', headers=JSON)
        assert answer.status_code == 200  # Windows editors put a byte order mark in front

    serving(test)


def test_bodies_over_the_limit_are_refused_as_they_stream():
    async def test(client, scheduler) -> None:
        async def endless():
            for _ in range(1000):
                sent.append(1)
                yield b"x" * 100

        sent: list[int] = []
        expect_error(await client.post(OPENAI, content=b"x" * 1001, headers=JSON), 413, "1000 bytes")
        expect_error(await client.post(OPENAI, content=endless(), headers=JSON), 413, "1000 bytes")
        assert len(sent) < 100  # and no more is read than is worth it
        assert (await client.post(OPENAI, json={"input": "a"})).status_code == 200

    serving(test, max_body_bytes=1000)


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

    serving(test, engine=FakeEngine(delay_s=0.05), max_queue_tokens=200)


def test_a_fault_of_the_engine_is_a_500_without_details(caplog):
    class Broken(FakeEngine):
        def forward(self, tokens):
            raise RuntimeError("secret detail")

    class BrokenTokenizer(FakeEngine):
        def tokenize(self, texts, *, prompt="", truncate=True):
            raise RuntimeError("secret detail")

    async def test(client, scheduler) -> None:
        answer = await client.post(OPENAI, json={"input": "private words"})
        assert expect_error(answer, 500)["type"] == "server_error"
        assert "secret" not in answer.text and "private" not in caplog.text

    serving(test, engine=Broken(), warm=False)
    serving(test, engine=BrokenTokenizer(), warm=False)


def test_metrics():
    async def test(client, scheduler) -> None:
        batches = scheduler.counters.batches
        await client.post(OPENAI, json={"input": ["a b", "a b", "c"]})
        await client.post(OPENAI, json={"input": ""})
        await client.get("/secret-path")
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        assert "secret-path" not in answer.text
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}

        def value(name: str, **labels: str) -> float:
            found = [
                sample.value
                for family in families.values()
                for sample in family.samples
                if sample.name == name and labels.items() <= sample.labels.items()
            ]
            assert len(found) == 1, (name, labels)
            return found[0]

        for family in families.values():
            for sample in family.samples:
                assert (sample.labels["model"], sample.labels["replica"]) == ("org/demo", "r1")
        assert value("gist_ray_requests_total", route="/v1/embeddings", status="200") == 1
        assert value("gist_ray_requests_total", route="/v1/embeddings", status="400") == 1
        assert value("gist_ray_requests_total", route="other", status="404") == 1
        assert value("gist_ray_request_seconds_count", route="/v1/embeddings") == 2
        assert value("gist_ray_texts_total") == 3 and value("gist_ray_tokens_total") == 11
        assert value("gist_ray_texts_deduplicated_total") == 1
        assert value("gist_ray_batches_total") == batches + 1
        assert value("gist_ray_batch_tokens_total") == 7 and value("gist_ray_padded_tokens_total") == 8
        assert value("gist_ray_padding_ratio") == pytest.approx(1 / 8)
        assert value("gist_ray_queue_tokens") == 0 and value("gist_ray_ready") == 1
        assert value("gist_ray_request_texts_sum") == 3
        for phase in ("tokenize", "queue", "forward", "serialize"):
            assert value("gist_ray_phase_seconds_count", phase=phase) == 1

    serving(test, replica="r1")


def test_where_the_time_went_stands_in_the_headers():
    async def test(client, scheduler) -> None:
        for route, field in ((OPENAI, "input"), (TEI, "inputs")):
            headers = (await client.post(route, json={field: [f"a b {route}", "c"]})).headers
            parts = {name: float(headers[f"x-{name}-time"]) for name in ("tokenization", "queue", "inference", "total")}
            assert headers["x-prompt-tokens"] == str(5 + 3)
            assert parts["inference"] >= 20 and parts["total"] < 5000  # the engine takes 20 ms
            assert parts["total"] == pytest.approx(sum(parts.values()) - parts["total"], abs=5)

    serving(test, engine=FakeEngine(delay_s=0.02))


@pytest.mark.parametrize("kind", ["float", "int8", "uint8", "binary", "ubinary"])
def test_output_types_as_numbers_base64_and_bytes(kind: str):
    async def test(client, scheduler) -> None:
        rows = as_type(expected("a b", "c"), kind)
        ask = {"input": ["a b", "c"], "output_dtype": kind}
        plain = (await client.post(OPENAI, json=ask)).json()
        coded = (await client.post(OPENAI, json=ask | {"encoding_format": "base64"})).json()
        tei = (await client.post(TEI, json={"inputs": ask["input"], "output_dtype": kind})).json()
        raw = await client.post(OPENAI, json=ask, headers={"accept": "application/octet-stream"})
        also = await client.post(
            TEI, json={"inputs": ask["input"], "output_dtype": kind}, headers={"accept": "application/octet-stream"}
        )
        assert raw.headers["content-type"] == "application/octet-stream" and raw.content == also.content
        assert raw.headers["x-embedding-shape"] == f"2,{rows.shape[1]}"
        found = np.frombuffer(raw.content, dtype=raw.headers["x-embedding-dtype"]).reshape(rows.shape)
        np.testing.assert_array_equal(found, rows)
        for place, row in enumerate(rows):
            numbers = np.array(plain["data"][place]["embedding"], dtype=rows.dtype)
            np.testing.assert_array_equal(numbers, row)
            np.testing.assert_array_equal(np.array(tei[place], dtype=rows.dtype), row)
            assert base64.b64decode(coded["data"][place]["embedding"]) == row.tobytes()
        expect_error(await client.post(OPENAI, json={"input": "a", "output_dtype": "int4"}), 422)

    serving(test)


def test_similarity_is_the_cosine_with_each_sentence():
    async def test(client, scheduler) -> None:
        body = {"inputs": {"source_sentence": "a b", "sentences": ["a b", "c", "d e"]}}
        answer = await client.post("/similarity", json=body)
        whole = expected("a b", "c", "d e")
        np.testing.assert_allclose(answer.json(), whole @ whole[0], atol=1e-6)
        prompted = await client.post("/similarity", json=body | {"parameters": {"prompt_name": "query"}})
        assert prompted.status_code == 200 and prompted.json()[1] != answer.json()[1]
        for inputs, status in (
            ({"source_sentence": "a"}, 422),
            ({"source_sentence": "", "sentences": ["a"]}, 400),
            ({"source_sentence": "a", "sentences": []}, 400),
            ({"source_sentence": ["a"], "sentences": ["a"]}, 422),
            ("a", 422),
        ):
            expect_error(await client.post("/similarity", json={"inputs": inputs}), status)
        many = {"source_sentence": "a", "sentences": ["a"] * (MAX_TEXTS + 1)}
        expect_error(await client.post("/similarity", json={"inputs": many}), 413, "split")

    serving(test)


def test_tokens_and_the_characters_they_stand_for():
    async def test(client, scheduler) -> None:
        answer = (await client.post("/tokenize", json={"inputs": ["one two", "x"]})).json()
        assert [len(pieces) for pieces in answer] == [4, 3]
        assert [piece["special"] for piece in answer[0]] == [True, False, False, True]
        assert (answer[0][2]["start"], answer[0][2]["stop"], answer[0][2]["text"]) == (4, 7, "two")
        bare = (await client.post("/tokenize", json={"inputs": "one two", "add_special_tokens": False})).json()
        assert bare == [answer[0][1:3]]
        prompted = (await client.post("/tokenize", json={"inputs": "x", "prompt_name": "query"})).json()
        assert [piece["text"] for piece in prompted[0]] == ["[start]", "find", "x", "[end]"]
        expect_error(await client.post("/tokenize", json={"inputs": "x", "prompt_name": "no"}), 422, "query")

    serving(test)


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

    with caplog.at_level("INFO", logger="gist_ray.serving.api"):
        serving(test, api_key_sha256=(digest,), access_log=True)
        lines = [record.getMessage() for record in caplog.records if record.name == "gist_ray.serving.api"]
        assert len(lines) == 2 and re.fullmatch(r"POST /v1/embeddings 200 [0-9.]+ ms 4 tokens", lines[0])
        assert re.fullmatch(r"GET other 404 [0-9.]+ ms 0 tokens", lines[1])
        caplog.clear()
        serving(test, api_key_sha256=(digest,))
        assert not [record for record in caplog.records if record.name == "gist_ray.serving.api"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["input", "inputs", "model", "dimensions", "encoding_format", "truncate", "user"])


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(NAMES, JSON_VALUES, max_size=4), st.sampled_from(POSTS))
def test_no_json_makes_a_server_error(body, route):
    async def test(client, scheduler) -> None:
        answer = await client.post(route, content=json.dumps(body), headers=JSON)
        if answer.status_code != 200:
            assert answer.status_code in (400, 404, 413, 422)
            expect_error(answer, answer.status_code)

    serving(test, warm=False)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=64))
def test_no_bytes_make_a_server_error(body):
    async def test(client, scheduler) -> None:
        answer = await client.post(OPENAI, content=body, headers=JSON)
        assert answer.status_code in (400, 422)
        expect_error(answer, answer.status_code)

    serving(test, warm=False)


def test_the_api_does_not_need_ray():
    code = "import sys, gist_ray.serving.api; sys.exit('ray' in sys.modules)"
    environment = {**os.environ, "COVERAGE_PROCESS_START": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120).returncode == 0
