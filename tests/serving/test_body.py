"""What may be asked: malformed bodies, bad fields, limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_ray.serving.schema import MAX_TEXTS
from tests.serving.served import JSON, OPENAI, POSTS, TEI, expect_error, serving

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

    serving(test)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=64))
def test_no_bytes_make_a_server_error(body):
    async def test(client, scheduler) -> None:
        answer = await client.post(OPENAI, content=body, headers=JSON)
        assert answer.status_code in (400, 422)
        expect_error(answer, answer.status_code)

    serving(test)
