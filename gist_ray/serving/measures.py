"""Measures: what a Prometheus server reads at `/metrics`, of one replica. Nothing here knows a text.

Several replicas answer behind one address: labels tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gist_ray.serving.outcomes import Embeddings
from gist_ray.serving.scheduler import Scheduler

_NAMES = ("model", "replica")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Measures:
    """Counts and times of one replica."""

    def __init__(self, scheduler: Scheduler, model_id: str, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = (model_id, replica)
        self._answers = Counter(
            "gist_ray_requests", "Answers by route and status.", (*_NAMES, "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "gist_ray_request_seconds",
            "From the head of a request to the last byte of its answer.",
            (*_NAMES, "route"),
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
        ).labels(*self._labels)
        self._phase = {
            phase: self._phases.labels(*self._labels, phase) for phase in ("tokenize", "queue", "forward", "serialize")
        }
        self._registry.register(_OfScheduler(scheduler, self._labels))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._answers.labels(*self._labels, route, str(status)).inc()
        self._seconds.labels(*self._labels, route).observe(seconds)

    def embedded(self, found: Embeddings, serialize_s: float) -> None:
        """Note where the time of a request for embeddings went."""
        self._request_texts.observe(len(found.vectors))
        seconds = {"tokenize": found.tokenize_s, "queue": found.queue_s, "forward": found.forward_s}
        for phase, value in (seconds | {"serialize": serialize_s}).items():
            self._phase[phase].observe(value)

    def text(self) -> bytes:
        """In Prometheus's text format, version 0.0.4."""
        return generate_latest(self._registry)


class _OfScheduler(Collector):
    """The scheduler's counters, and what a reader would derive from them."""

    def __init__(self, scheduler: Scheduler, labels: tuple[str, str]) -> None:
        self._scheduler, self._values = scheduler, labels

    def describe(self) -> list[Metric]:
        """Nothing to compare with when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """As they are now."""
        scheduler = self._scheduler
        counters = asdict(scheduler.counters)
        for name, value in counters.items():
            family = CounterMetricFamily(f"gist_ray_{name}", name.replace("_", " "), labels=_NAMES)
            family.add_metric(self._values, value)
            yield family
        padded, capacity = counters["padded_tokens"], counters["batches"] * scheduler.batch_tokens
        gauges = {
            "queue_tokens": scheduler.queued_tokens,
            "batch_fill_ratio": padded / capacity if capacity else 0,
            "padding_ratio": 1 - counters["batch_tokens"] / padded if padded else 0,
            "tokens_per_second": scheduler.tokens_per_second,
            "cache_bytes": scheduler.cache.bytes,
            "ready": int(scheduler.ready),
        }
        for name, value in gauges.items():
            gauge = GaugeMetricFamily(f"gist_ray_{name}", name.replace("_", " "), labels=_NAMES)
            gauge.add_metric(self._values, value)
            yield gauge
