"""Names of the event bus's metrics, and the set of them that a bus keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter

    from dynamo_core.telemetry import Metrics

LOST = "dynamo_runtime_bus_lost_events_total"
MALFORMED = "dynamo_runtime_bus_malformed_messages_total"
REPLAYED = "dynamo_runtime_bus_replayed_events_total"
SNAPSHOTS = "dynamo_runtime_bus_snapshots_total"
ABSENT_SNAPSHOTS = "dynamo_runtime_bus_absent_snapshots_total"
BUFFERED = "dynamo_runtime_bus_buffered_events"
RING = "dynamo_runtime_bus_ring_events"

BROKERED = "dynamo_runtime_broker_packets_total"


class BrokerMetrics:
    """The metrics of a broker.

    Args:
        metrics: Where to register; None registers nothing.
    """

    def __init__(self, metrics: Metrics | None) -> None:
        self._packets = metrics.counter(BROKERED, "Packets of events passed on") if metrics else None

    def passed_on(self) -> None:
        """Count a packet."""
        if self._packets is not None:
            self._packets.inc()


class BusMetrics:
    """The metrics of one bus; without a registry they only count in memory.

    Args:
        metrics: Where to register; None registers nothing.
        buffered: Reads how many events wait for subscribers.
        ring: Reads how many events publishers hold for replay.
    """

    def __init__(self, metrics: Metrics | None, buffered: Callable[[], int], ring: Callable[[], int]) -> None:
        self.counts: dict[str, int] = dict.fromkeys((LOST, MALFORMED, REPLAYED, SNAPSHOTS, ABSENT_SNAPSHOTS), 0)
        self._counters: dict[str, Counter] = {}
        if metrics is None:
            return
        metrics.gauge(BUFFERED, "Events that wait for a subscriber").set_function(buffered)
        metrics.gauge(RING, "Events held for replay").set_function(ring)
        for name, documentation in (
            (LOST, "Events that a subscriber missed, by gaps and by its own full buffer"),
            (MALFORMED, "Messages that could not be read"),
            (REPLAYED, "Events fetched from a publisher's ring"),
            (SNAPSHOTS, "States fetched from publishers"),
            (ABSENT_SNAPSHOTS, "Publishers that were asked for their state and did not give it"),
        ):
            self._counters[name] = metrics.counter(name, documentation)

    def add(self, name: str, amount: int = 1) -> None:
        """Count."""
        self.counts[name] += amount
        counter = self._counters.get(name)
        if counter is not None:
            counter.inc(amount)
