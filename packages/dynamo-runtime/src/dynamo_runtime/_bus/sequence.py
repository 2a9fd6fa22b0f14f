"""Order within a topic: which events are new, which are duplicates, which are missing. No I/O."""

from __future__ import annotations

from collections import OrderedDict

from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_runtime._bus.wire import Packet

MAX_PUBLISHERS = 65536
"""Publishers of a topic whose sequence is remembered; the ones that were silent longest are forgotten first."""


class SequenceTracker:
    """The newest sequence seen of each publisher of a topic.

    Args:
        topic: Its full name.
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._last: OrderedDict[int, int] = OrderedDict()

    def last(self, publisher_id: int) -> int | None:
        """Return the newest sequence seen of a publisher, None for one never heard of."""
        return self._last.get(publisher_id)

    def known(self) -> list[int]:
        """Return the publishers heard of."""
        return list(self._last)

    def begin(self, publisher_id: int, last: int) -> None:
        """Expect a publisher to go on after ``last``, unless it is known already."""
        if publisher_id not in self._last:
            self._move(publisher_id, last)

    def missing_before(self, packet: Packet) -> int:
        """Return how many events between the known ones and the packet's first (or, without any, its last) lack."""
        last = self._last.get(packet.publisher_id)
        if last is None:
            return 0
        reached = packet.events[0].sequence - 1 if packet.events else packet.last
        return max(0, reached - last)

    def accept(self, packet: Packet) -> list[EventEnvelope | SequenceGap]:
        """Return what of a packet is new, with gaps where events are missing."""
        publisher_id = packet.publisher_id
        last = self._last.get(publisher_id)
        if last is None:
            # Never heard of: what came before this packet came before the subscription.
            last = packet.events[0].sequence - 1 if packet.events else packet.last
        news: list[EventEnvelope | SequenceGap] = []
        for event in packet.events:
            sequence = event.sequence
            if sequence <= last:
                continue
            if sequence > last + 1:
                news.append(SequenceGap(self._topic, publisher_id, last + 1, sequence - 1))
            news.append(event)
            last = sequence
        if not packet.events and packet.last > last:
            news.append(SequenceGap(self._topic, publisher_id, last + 1, packet.last))
            last = packet.last
        self._move(publisher_id, last)
        return news

    def _move(self, publisher_id: int, last: int) -> None:
        self._last[publisher_id] = last
        self._last.move_to_end(publisher_id)
        if len(self._last) > MAX_PUBLISHERS:
            self._last.popitem(last=False)
