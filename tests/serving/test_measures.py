"""What Prometheus reads."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gist_ray.serving.api import create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.gate import Access
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.scheduler import Scheduler
from tests.serving.served import OPENAI, client_of, serving


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
                assert sample.labels["replica"] == "r1" and sample.labels.get("model", "org/demo") == "org/demo"
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
        assert value("gist_ray_request_texts_sum", model="org/demo") == 3 and value("gist_ray_failed_swaps_total") == 0
        for phase in ("tokenize", "queue", "forward", "serialize"):
            assert value("gist_ray_phase_seconds_count", phase=phase) == 1

    serving(test, replica="r1")


def test_models_are_counted_apart():
    async def run() -> None:
        models = Models(lambda place: FakeEngine(), Scheduler)
        await models.replace({"a": "x", "b": "y"})
        async with client_of(create_api(models, Measures(models, "r1"), Access())) as client:
            for model, texts in (("a", 1), ("b", 2), ("b", 4), ("a", 8)):
                answer = await client.post(OPENAI, json={"input": ["a"] * texts, "model": model})
                assert answer.json()["model"] == model
            lines = (await client.get("/metrics")).text.splitlines()
        for model, texts in (("a", 9), ("b", 6)):
            labels = f'{{model="{model}",replica="r1"}}'
            assert f"gist_ray_request_texts_sum{labels} {texts}.0" in lines
            assert f"gist_ray_texts_total{labels} {texts}.0" in lines
            assert f'gist_ray_phase_seconds_count{{model="{model}",phase="forward",replica="r1"}} 2.0' in lines
        await models.close()

    asyncio.run(run())
