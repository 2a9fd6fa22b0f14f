"""The last events of one stream."""

from __future__ import annotations

from collections import deque
from itertools import islice


class EventRing:
    """Events by number, from 1 on; the oldest go when the ring is full. The newest event always stays.

    Args:
        capacity_bytes: Most bytes of all events together.
    """

    __slots__ = ("_capacity", "_events", "first", "size_bytes")

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._events: deque[bytes] = deque()
        self.first = 1
        self.size_bytes = 0

    @property
    def last(self) -> int:
        """Number of the newest event; 0 before any."""
        return self.first + len(self._events) - 1

    def add(self, event: bytes) -> None:
        """Keep one more event."""
        self._events.append(event)
        self.size_bytes += len(event)
        while self.size_bytes > self._capacity and len(self._events) > 1:
            self.size_bytes -= len(self._events.popleft())
            self.first += 1

    def after(self, number: int) -> list[bytes] | None:
        """Return the events behind a number; None if one of them is gone, or the number was never given."""
        if not self.first - 1 <= number <= self.last:
            return None
        return list(islice(self._events, number - self.first + 1, None))
