"""The official OpenAI client, synchronous and asynchronous."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError, OpenAI, RateLimitError

from tests.conformance.served import KEY, MODEL_ID, PROMPTS, TEXTS, Served

pytestmark = pytest.mark.slow


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
        yield client


def test_vectors_and_usage(client, served):
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    plain = client.embeddings.create(model=MODEL_ID, input=TEXTS, encoding_format="float")
    served.agrees([item.embedding for item in plain.data])
    assert plain.usage.prompt_tokens == plain.usage.total_tokens == sum(map(len, served.encoder.tokenize(TEXTS)))
    default = client.embeddings.create(model=MODEL_ID, input=TEXTS)  # asks for base64 and decodes it
    served.agrees([item.embedding for item in default.data])
    coded = client.embeddings.create(model=MODEL_ID, input=TEXTS, encoding_format="base64")
    served.agrees([np.frombuffer(base64.b64decode(item.embedding), "<f4") for item in coded.data])
    single = client.embeddings.create(model=MODEL_ID, input=TEXTS[0])
    served.agrees([item.embedding for item in single.data], TEXTS[:1])


def test_dimensions_and_extensions(client, served):
    short = client.embeddings.create(model=MODEL_ID, input=TEXTS, dimensions=64)
    cut = served.vectors[:, :64]
    expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array([item.embedding for item in short.data]), expected, atol=1e-5)
    prompted = client.embeddings.create(model=MODEL_ID, input=TEXTS, extra_body={"prompt_name": "query"})
    served.agrees([item.embedding for item in prompted.data], TEXTS, prompt=PROMPTS["query"])


def test_asynchronous(served):
    async def ask() -> list[list[float]]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
            asked = [client.embeddings.create(model=MODEL_ID, input=text) for text in TEXTS]
            return [answer.data[0].embedding for answer in await asyncio.gather(*asked)]

    served.agrees(asyncio.run(ask()))


def test_errors_are_the_client_s_own(client, served):
    with pytest.raises(AuthenticationError) as refused:
        client.with_options(api_key="wrong").embeddings.create(model=MODEL_ID, input="x")
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(NotFoundError, match=MODEL_ID) as unknown:
        client.embeddings.create(model="gpt", input="x")
    assert unknown.value.param == "model"
    with pytest.raises(BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model=MODEL_ID, input=[[1, 2, 3]])

    async def ask() -> None:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="wrong") as other:
            await other.embeddings.create(model=MODEL_ID, input="x")

    with pytest.raises(AuthenticationError):
        asyncio.run(ask())


def test_a_full_queue_is_waited_for(client, served):
    """429 with Retry-After: an error where the client may not retry, a pause where it may."""
    texts = long_texts(24, "the one that comes too late")
    with full_queue(served, "first"):
        with pytest.raises(RateLimitError, match="tokens wait") as shed:
            client.with_options(max_retries=0).embeddings.create(model=MODEL_ID, input=texts)
        assert int(shed.value.response.headers["retry-after"]) >= 1 and shed.value.code == "overloaded"
        started = time.monotonic()
        raw = client.with_options(max_retries=5).embeddings.with_raw_response.create(model=MODEL_ID, input=texts)
        assert raw.retries_taken >= 1 and time.monotonic() - started >= 1
        served.agrees([item.embedding for item in raw.parse().data], texts)


def test_a_full_queue_is_waited_for_asynchronously(served):
    texts = long_texts(24, "asynchronous")

    async def ask(retries: int) -> tuple[int, list[list[float]]]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=retries) as client:
            raw = await client.embeddings.with_raw_response.create(model=MODEL_ID, input=texts)
            return raw.retries_taken, [item.embedding for item in raw.parse().data]

    with full_queue(served, "second"):
        with pytest.raises(RateLimitError):
            asyncio.run(ask(retries=0))
        retries, vectors = asyncio.run(ask(retries=5))
    assert retries >= 1
    served.agrees(vectors, texts)


def long_texts(count: int, start: str) -> list[str]:
    """Texts of 256 tokens each, all that the model reads; no two are equal."""
    return [f"{start} {number} " + "word " * 300 for number in range(count)]


@contextmanager
def full_queue(served: Served, name: str) -> Iterator[None]:
    """The queue nearly full: 38 x 256 = 9,728 of 10,000 tokens, which take the model a second or two."""
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        done = pool.submit(client.post, "/embed", json={"inputs": long_texts(38, name)})
        while queued_tokens(served.url) < 6_000:
            assert not done.done(), "the queue was worked off before it was seen to be full"
        yield
        assert done.result().status_code == 200


def queued_tokens(url: str) -> float:
    metrics = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    line = next(line for line in metrics.splitlines() if line.startswith("gist_ray_queue_tokens{"))
    return float(line.rpartition(" ")[2])
