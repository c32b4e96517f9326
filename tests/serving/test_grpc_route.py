"""The gRPC method, over a real server and client, without a model."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.gate import Access
from gist_ray.serving.grpc_messages import FILE, EmbedRequest, add_servicer, stub
from gist_ray.serving.grpc_route import GrpcRoute
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.scheduler import Scheduler

PROTO = Path(__file__).parents[2] / "serve" / "embeddings.proto"
Ask = Callable[..., Awaitable[Any]]


def serving(
    test: Callable[[Ask, Measures], Awaitable[None]],
    max_queue_tokens: int = 10_000,
    delay_s: float = 0.01,
    **access: Any,
) -> None:
    """Run a test against the method; a forward takes `delay_s`."""

    async def run() -> None:
        engine = FakeEngine(prompts={"query": "find "}, max_tokens=64, delay_s=delay_s)
        models = Models(lambda place: engine, partial(Scheduler, batch_tokens=1024, max_queue_tokens=max_queue_tokens))
        await models.replace({"org/demo": "a-place"})
        measures = Measures(models, "r1")
        route = GrpcRoute(models, measures, Access(**access))

        class Servicer:
            async def Embed(self, request: Any, context: Any) -> Any:
                return await route.embed(request, context)

        server = grpc.aio.server()
        add_servicer(Servicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                embed = stub(channel)

                async def ask(metadata: Any = None, **fields: Any) -> Any:
                    return await embed(EmbedRequest(**fields), metadata=metadata, timeout=30)

                await test(ask, measures)
        finally:
            await server.stop(0)
            await models.close()

    asyncio.run(run())


def expected(*texts: str) -> np.ndarray:
    engine = FakeEngine(max_tokens=64)
    return engine.forward(engine.tokenize(texts))


def test_the_same_answers_as_over_http():
    async def test(ask: Ask, measures: Measures) -> None:
        answer = await ask(texts=["a b", "c"])
        assert (answer.dim, answer.num_tokens, answer.model) == (16, 7, "org/demo")
        vectors = np.frombuffer(answer.vectors, "<f4").reshape(-1, answer.dim)
        np.testing.assert_array_equal(vectors, expected("a b", "c"))
        short = await ask(texts=["a b"], dimensions=4, model="org/demo")
        cut = np.frombuffer(short.vectors, "<f4")
        whole = expected("a b")[0]
        np.testing.assert_allclose(cut, whole[:4] / np.linalg.norm(whole[:4]), atol=1e-6)
        prompted = await ask(texts=["a b"], prompt_name="query")
        np.testing.assert_array_equal(np.frombuffer(prompted.vectors, "<f4"), expected("find a b")[0])
        assert 'gist_ray_requests_total{replica="r1",route="grpc:Embed",status="200"} 3.0' in measures.text().decode()

    serving(test)


@pytest.mark.parametrize(
    ("fields", "code", "contains"),
    [
        ({"texts": []}, grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        ({"texts": ["a", ""]}, grpc.StatusCode.INVALID_ARGUMENT, "index 1"),
        ({"texts": ["a"] * 2049}, grpc.StatusCode.INVALID_ARGUMENT, "2048"),
        ({"texts": ["a"], "dimensions": 17}, grpc.StatusCode.INVALID_ARGUMENT, "16"),
        ({"texts": ["a"], "dimensions": 0}, grpc.StatusCode.INVALID_ARGUMENT, "dimensions"),
        ({"texts": ["a"], "prompt_name": "no"}, grpc.StatusCode.INVALID_ARGUMENT, "query"),
        ({"texts": ["a " * 99], "truncate": False}, grpc.StatusCode.INVALID_ARGUMENT, "101 tokens"),
        ({"texts": ["a"], "model": "gpt"}, grpc.StatusCode.NOT_FOUND, "org/demo"),
    ],
)
def test_bad_requests(fields: dict[str, Any], code: grpc.StatusCode, contains: str, caplog):
    async def test(ask: Ask, measures: Measures) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(**fields)
        assert caught.value.code() == code and contains in caught.value.details()

    serving(test)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_keys_and_peers():
    async def with_key(ask: Ask, measures: Measures) -> None:
        for metadata in (None, [("authorization", "Bearer no")], [("authorization", "key")]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(metadata, texts=["a"])
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert (await ask([("authorization", "Bearer key")], texts=["a"])).dim == 16

    async def refused(ask: Ask, measures: Measures) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(texts=["a"])
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED

    async def admitted(ask: Ask, measures: Measures) -> None:
        assert (await ask(texts=["a"])).dim == 16

    serving(with_key, api_key_sha256=(hashlib.sha256(b"key").hexdigest(),))
    serving(refused, peers=frozenset({"10.0.0.1"}))
    serving(admitted, peers=frozenset({"127.0.0.1"}))


def test_a_fault_of_ours_is_logged_and_not_told(caplog, monkeypatch):
    async def test(ask: Ask, measures: Measures) -> None:
        def broken(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("secret detail")

        monkeypatch.setattr(FakeEngine, "tokenize", broken)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(texts=["private words"])
        assert caught.value.code() == grpc.StatusCode.INTERNAL and "secret" not in caught.value.details()
        assert "secret detail" in caplog.text and "private" not in caplog.text

    serving(test)


def test_overload_says_when_to_come_back():
    async def test(ask: Ask, measures: Measures) -> None:
        asks = [ask(texts=[f"request {i} " + "w " * 20]) for i in range(40)]
        answers = await asyncio.gather(*asks, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        assert errors and len(errors) < 40
        for error in errors:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(dict(error.trailing_metadata())["retry-after"]) >= 1

    serving(test, max_queue_tokens=200, delay_s=0.5)  # long enough for all of them to come on a busy machine


def test_the_proto_file_describes_the_same_messages(tmp_path: Path):
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    out = tmp_path / "set"
    assert protoc.main(["", f"-I{PROTO.parent}", f"--descriptor_set_out={out}", str(PROTO)]) == 0
    (compiled,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    for file in (compiled, FILE):
        for message in file.message_type:
            for field in message.field:
                field.ClearField("json_name")
    assert compiled.package == FILE.package
    assert list(compiled.message_type) == list(FILE.message_type)
    assert list(compiled.service) == list(FILE.service)
