"""What Prometheus would read of a running Ray: the metrics of its nodes."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[str, list[tuple[dict[str, str], float]]]
"""Name to labels and value of each sample."""


def samples(text: str, prefix: str = "") -> Samples:
    """Of a page of metrics: those whose name begins with `prefix`, which is taken off."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                found.setdefault(sample.name.removeprefix(prefix), []).append((sample.labels, sample.value))
    return found


def node_metrics(prefix: str = "") -> Samples:
    """Of all nodes of the Ray that this process is connected to."""
    import ray

    found: Samples = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for name, values in samples(httpx.get(address, timeout=30, trust_env=False).text, prefix).items():
            found.setdefault(name, []).extend(values)
    return found
