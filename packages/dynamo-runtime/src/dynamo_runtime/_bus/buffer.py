"""Events of one topic on their way to one reader: in order, without duplicates, bounded, with gaps made visible."""

from __future__ import annotations

import asyncio
from collections import deque

from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_runtime._bus._metrics import LOST, BusMetrics
from dynamo_runtime._bus.sequence import SequenceTracker
from dynamo_runtime._bus.wire import Packet


class EventBuffer:
    """What a subscription has and its reader does not.

    Args:
        topic: Full topic name.
        limit: Events that may wait; beyond it the oldest are dropped and show as a gap.
        metrics: Counts.
    """

    def __init__(self, topic: str, limit: int, metrics: BusMetrics) -> None:
        self.tracker = SequenceTracker(topic)
        self._topic = topic
        self._limit = limit
        self._metrics = metrics
        self._events: deque[EventEnvelope | SequenceGap] = deque()
        self._lost: dict[int, SequenceGap] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._events)

    def take(self, packet: Packet) -> None:
        """Add what of a packet is new."""
        for item in self.tracker.accept(packet):
            if isinstance(item, SequenceGap):
                self._metrics.add(LOST, item.last - item.first + 1)
            if len(self._events) >= self._limit:
                self._drop(self._events.popleft())
            self._events.append(item)
        self._wake.set()

    async def next(self) -> EventEnvelope | SequenceGap:
        """Return the next event, or the gap that stands before it. Cancelling loses nothing.

        Raises:
            StopAsyncIteration: once closed.
        """
        while not self._closed:
            if self._lost:
                # What was dropped is older than everything in the buffer, so its gap comes first.
                return self._lost.pop(next(iter(self._lost)))
            if self._events:
                return self._events.popleft()
            self._wake.clear()
            await self._wake.wait()
        raise StopAsyncIteration

    def close(self) -> None:
        """Forget everything; the reader stops."""
        self._closed = True
        self._events.clear()
        self._wake.set()

    def _drop(self, item: EventEnvelope | SequenceGap) -> None:
        if isinstance(item, SequenceGap):
            first, last = item.first, item.last
        else:
            first = last = item.sequence
            self._metrics.add(LOST)
        known = self._lost.get(item.publisher_id)
        first = known.first if known is not None else first
        self._lost[item.publisher_id] = SequenceGap(self._topic, item.publisher_id, first, last)
