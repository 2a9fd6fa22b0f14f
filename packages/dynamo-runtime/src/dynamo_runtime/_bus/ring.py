"""The newest events of a publisher, kept for replay."""

from __future__ import annotations

from collections import deque

from dynamo_core.events import EventEnvelope


class EventRing:
    """The newest events of a publisher, bounded in number and bytes.

    Args:
        max_events: Most events held.
        max_bytes: Most payload bytes held; the newest event stays even if it alone exceeds them.
    """

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._events: deque[EventEnvelope] = deque()
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._events)

    def append(self, event: EventEnvelope) -> None:
        """Add the newest event."""
        self._events.append(event)
        self._bytes += len(event.payload)
        while len(self._events) > self._max_events or (self._bytes > self._max_bytes and len(self._events) > 1):
            self._bytes -= len(self._events.popleft().payload)

    def select(self, first: int, last: int | None) -> list[EventEnvelope]:
        """Return events ``first..last`` that are still held."""
        if not self._events:
            return []
        start = max(0, first - self._events[0].sequence)
        newest = self._events[-1].sequence
        stop = len(self._events) - max(0, newest - (newest if last is None else last))
        return [self._events[index] for index in range(start, stop)] if start < stop else []
