"""What is answered, route by route."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from gist_ray.serving.answers import as_type, cut
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.schema import MAX_TEXTS
from tests.serving.served import OPENAI, TEI, expect_error, expected, serving


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
        whole_number = (await client.post(TEI, json={"inputs": "a b", "dimensions": 4.0})).json()  # some languages' 4
        np.testing.assert_array_equal(whole_number[0], vector)
        for bad in (0, -1, 17, 10**30, 1.5, -1.0, 17.0, 1e300, "4", True, [4]):
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
        single = await client.post("/similarity", json={"inputs": {"source_sentence": "a b", "sentences": "c"}})
        assert single.json() == answer.json()[1:2]
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
