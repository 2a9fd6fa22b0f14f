"""Names of the request plane's metrics, and the set of them that a plane keeps.

Nothing here is touched per item: gauges are read when scraped, counters count rare events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

CONNECTIONS = "dynamo_runtime_plane_connections"
CALLS_SERVED = "dynamo_runtime_plane_served_calls"
CALLS_QUEUED = "dynamo_runtime_plane_queued_calls"
INHIBITED = "dynamo_runtime_plane_inhibited_addresses"
CALLS_OPEN = "dynamo_runtime_plane_open_calls"
CONNECTS = "dynamo_runtime_plane_connects_total"
FAULTS = "dynamo_runtime_plane_faults_total"

FAULT_KINDS = ("malformed", "keepalive", "disconnected", "overrun", "refused", "overloaded", "too_large")


class PlaneMetrics:
    """Counters of one plane; without a registry they only count in memory.

    Args:
        metrics: Where to register; None keeps them private.
    """

    def __init__(self, metrics: Metrics | None) -> None:
        self.faults: dict[str, int] = dict.fromkeys(FAULT_KINDS, 0)
        self.connects = 0
        self._faults = metrics.counter(FAULTS, "Connections or calls ended for a fault", ["kind"]) if metrics else None
        self._connects = metrics.counter(CONNECTS, "Connections opened to peers") if metrics else None
        self._metrics = metrics

    def fault(self, kind: str) -> None:
        """Count one fault."""
        self.faults[kind] += 1
        if self._faults is not None:
            self._faults.labels(kind=kind).inc()

    def connect(self) -> None:
        """Count one connection opened."""
        self.connects += 1
        if self._connects is not None:
            self._connects.inc()

    def watch(self, name: str, documentation: str, read: Callable[[], int]) -> None:
        """Read a gauge from ``read`` whenever it is scraped."""
        if self._metrics is not None:
            self._metrics.gauge(name, documentation).set_function(read)
