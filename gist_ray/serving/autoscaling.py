"""Autoscaling: how many replicas the waiting tokens ask for. Pure; Ray Serve calls it in its controller.

Ray's own policy counts requests, and a request may be a query or two thousand documents. Replicas report instead how
many seconds of work wait for them, and which share of the time they computed.
"""

from __future__ import annotations

import math
from typing import Any

TARGET_QUEUE_S = 0.5
"""Seconds of work that may wait at a replica before another is worth it."""
TARGET_BUSY = 0.8
"""Share of its time that a replica should compute: less, and one of several can go."""


def replicas_for_backlog(context: Any) -> tuple[int, dict[str, Any]]:
    """Replicas wanted, for `AutoscalingContext`; Serve keeps them within min and max, and delays changes.

    Enough that no replica has more than `TARGET_QUEUE_S` seconds of work waiting or computes more than `TARGET_BUSY` of
    the time. None, if there is no request: Serve goes down to one or zero, as configured.
    """
    metrics = context.aggregated_metrics or {}
    queue_s, busy = (sum((metrics.get(name) or {}).values()) for name in ("queue_s", "busy"))
    wanted = max(queue_s / TARGET_QUEUE_S, busy / TARGET_BUSY)
    if context.total_num_requests == 0 and wanted < 0.05:
        return 0, {}
    return max(1, math.ceil(wanted - 1e-6)), {}


class Workload:
    """What a replica reports, from its schedulers' counters."""

    def __init__(self, now_s: float) -> None:
        self._asked_s, self._forward_s = now_s, 0.0

    def report(self, now_s: float, queue_s: float, forward_s: float) -> dict[str, float]:
        """`queue_s`: seconds that the waiting tokens will take. `busy`: share of the time since the last report.

        Seconds of a model that was swapped out are gone from `forward_s`: that report counts too little.
        """
        passed, computed = now_s - self._asked_s, forward_s - self._forward_s
        self._asked_s, self._forward_s = now_s, forward_s
        busy = min(1.0, max(0.0, computed / passed)) if passed > 0 else 0.0
        return {"queue_s": queue_s, "busy": busy}
