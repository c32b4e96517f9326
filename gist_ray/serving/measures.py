"""Measures: what a Prometheus server reads at `/metrics`, of one replica. Nothing here knows a text.

Several replicas answer behind one address: labels tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gist_ray.serving.models import Models, Served
from gist_ray.serving.outcomes import Embeddings

_NAMES = ("model", "replica")
_PHASES = ("tokenize", "queue", "forward", "serialize")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Measures:
    """Counts and times of one replica."""

    def __init__(self, models: Models, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._replica = replica
        self._answers = Counter(
            "gist_ray_requests", "Answers by route and status.", ("replica", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "gist_ray_request_seconds",
            "From the head of a request to the last byte of its answer.",
            ("replica", "route"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._phases = Histogram(
            "gist_ray_phase_seconds",
            "Of requests for embeddings: tokenize, queue, forward, serialize.",
            (*_NAMES, "phase"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._request_texts = Histogram(
            "gist_ray_request_texts", "Texts of a request.", _NAMES, buckets=_TEXTS, registry=self._registry
        )
        self._of_model: dict[str, tuple[Histogram, list[Histogram]]] = {}
        self._failed_swaps = Counter(
            "gist_ray_failed_swaps",
            "New models that could not be loaded; the old ones were kept.",
            ("replica",),
            registry=self._registry,
        ).labels(replica)
        self._registry.register(_OfModels(models, replica))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._answers.labels(self._replica, route, str(status)).inc()
        self._seconds.labels(self._replica, route).observe(seconds)

    def embedded(self, model_id: str, found: Embeddings, serialize_s: float) -> None:
        """Note where the time of a request for embeddings went."""
        if model_id not in self._of_model:  # prometheus_client would look each of them up, under a lock
            phases = [self._phases.labels(model_id, self._replica, phase) for phase in _PHASES]
            self._of_model[model_id] = (self._request_texts.labels(model_id, self._replica), phases)
        request_texts, phases = self._of_model[model_id]
        request_texts.observe(len(found.vectors))
        seconds = (found.tokenize_s, found.queue_s, found.forward_s, serialize_s)
        for phase, value in zip(phases, seconds, strict=True):
            phase.observe(value)

    def swap_failed(self) -> None:
        """Count a change of models that did not come about."""
        self._failed_swaps.inc()

    def text(self) -> bytes:
        """In Prometheus's text format, version 0.0.4."""
        return generate_latest(self._registry)


class _OfModels(Collector):
    """The counters of each model's scheduler, and what a reader would derive from them."""

    def __init__(self, models: Models, replica: str) -> None:
        self._models, self._replica = models, replica

    def describe(self) -> list[Metric]:
        """Nothing to compare with when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """As they are now."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for served in self._models:
            names = (served.model_id, self._replica)
            counters = asdict(served.scheduler.counters)
            for name, value in counters.items():
                counter = CounterMetricFamily(f"gist_ray_{name}", name.replace("_", " "), labels=_NAMES)
                families.setdefault(name, counter).add_metric(names, value)
            for name, value in _gauges(served, counters).items():
                gauge = GaugeMetricFamily(f"gist_ray_{name}", name.replace("_", " "), labels=_NAMES)
                families.setdefault(name, gauge).add_metric(names, value)
        yield from families.values()


def _gauges(served: Served, counters: dict[str, float]) -> dict[str, float]:
    scheduler = served.scheduler
    padded, capacity = counters["padded_tokens"], counters["batches"] * scheduler.batch_tokens
    return {
        "queue_tokens": scheduler.queued_tokens,
        "batch_limit_tokens": scheduler.batch_tokens,
        "batch_fill_ratio": padded / capacity if capacity else 0,
        "padding_ratio": 1 - counters["batch_tokens"] / padded if padded else 0,
        "tokens_per_second": scheduler.tokens_per_second,
        "cache_bytes": scheduler.cache.bytes,
        "ready": int(scheduler.ready),
    }
