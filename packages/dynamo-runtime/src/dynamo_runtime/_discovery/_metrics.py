"""Names of the metrics of discovery."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter

    from dynamo_core.discovery import DiscoveryStatus
    from dynamo_core.telemetry import Metrics

CONNECTED = "dynamo_runtime_discovery_connected"
RECORDS = "dynamo_runtime_discovery_records"
LEASES_EXPIRED = "dynamo_runtime_discovery_expired_leases_total"
LEASES_RESTORED = "dynamo_runtime_discovery_restored_leases_total"
GARBLED = "dynamo_runtime_discovery_garbled_files_total"
FAILURES = "dynamo_runtime_discovery_failures_total"
RESYNCS = "dynamo_runtime_discovery_resyncs_total"
STALE = "dynamo_runtime_discovery_stale_seconds"


class DiscoveryMetrics:
    """The metrics of one client; without a registry they go nowhere.

    Args:
        metrics: Where to register; None registers nothing.
        status: Reads the state of the connection.
        records: Reads how many records the view holds.
    """

    def __init__(
        self, metrics: Metrics | None, status: Callable[[], DiscoveryStatus], records: Callable[[], int]
    ) -> None:
        self._counters: dict[str, Counter] = {}
        if metrics is None:
            return
        metrics.gauge(CONNECTED, "Whether the discovery backend can be used").set_function(lambda: status().connected)
        metrics.gauge(STALE, "Seconds since the view was last known to be true").set_function(
            lambda: status().stale_for_s
        )
        metrics.gauge(RECORDS, "Records in this process's view").set_function(records)
        for name, documentation in (
            (LEASES_EXPIRED, "Dead leases of other processes that this one ended"),
            (LEASES_RESTORED, "Own leases that had been ended by others and were made again"),
            (GARBLED, "Files, keys and objects that could not be read as records"),
            (FAILURES, "Calls that could not reach the backend"),
            (RESYNCS, "Watches whose view was rebuilt by diff"),
        ):
            self._counters[name] = metrics.counter(name, documentation)

    def lease_expired(self) -> None:
        """Count a dead lease that was ended."""
        self._add(LEASES_EXPIRED)

    def lease_restored(self) -> None:
        """Count an own lease that was made again."""
        self._add(LEASES_RESTORED)

    def garbled(self, count: int) -> None:
        """Count what cannot be read as a record."""
        self._add(GARBLED, count)

    def failed(self) -> None:
        """Count a call that did not reach the backend."""
        self._add(FAILURES)

    def resynced(self) -> None:
        """Count a watch that was rebuilt."""
        self._add(RESYNCS)

    def _add(self, name: str, amount: int = 1) -> None:
        counter = self._counters.get(name)
        if counter is not None:
            counter.inc(amount)
