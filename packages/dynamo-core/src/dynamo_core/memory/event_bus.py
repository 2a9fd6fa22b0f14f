"""The event bus in one process: topics, a ring per publisher for replay, snapshots, a bounded buffer per subscription.

A subscriber that falls behind loses its oldest events and is told which, exactly as if a wire had dropped them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Mapping

from dynamo_core.clock import Clock, SystemClock
from dynamo_core.discovery import Discovery
from dynamo_core.errors import ConfigurationError, UnavailableError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.ids import PublisherId
from dynamo_core.memory.discovery import require_memory_url
from dynamo_core.planes import DEFAULT_SNAPSHOT_TIMEOUT_S, SnapshotSource, Topic

DEFAULT_RING_EVENTS = 4096
DEFAULT_BUFFER_EVENTS = 4096


class MemoryEventBus:
    """A client of a memory bus.

    Args:
        clock: Stamps events.
        ring_events: Events that each publisher keeps for replay.
        buffer_events: Events that a subscription may fall behind before it loses the oldest.
        topics: The topics of another client; new ones if omitted. ``peer`` is the way to share.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        ring_events: int = DEFAULT_RING_EVENTS,
        buffer_events: int = DEFAULT_BUFFER_EVENTS,
        topics: _Topics | None = None,
    ) -> None:
        if ring_events < 1 or buffer_events < 1:
            raise ConfigurationError("ring_events and buffer_events must be at least 1")
        self._clock = clock if clock is not None else SystemClock()
        self._topics = topics if topics is not None else _Topics(self._clock)
        self._ring_events = ring_events
        self._buffer_events = buffer_events
        self._publishers: dict[PublisherId, MemoryPublisher] = {}
        self._subscriptions: dict[MemorySubscription, None] = {}
        self._closed = False

    def peer(self) -> MemoryEventBus:
        """Return another client of the same topics, as another process would be."""
        return MemoryEventBus(
            clock=self._clock,
            ring_events=self._ring_events,
            buffer_events=self._buffer_events,
            topics=self._topics,
        )

    async def start(self) -> None:
        """Do nothing: the topics are here."""

    async def close(self) -> None:
        """Close all publishers and subscriptions. Idempotent."""
        self._closed = True
        for publisher in list(self._publishers.values()):
            await publisher.close()
        for subscription in list(self._subscriptions):
            await subscription.close()

    async def publisher(self, topic: Topic) -> MemoryPublisher:
        """Return a new publisher of a topic."""
        self._require_open()
        publisher = MemoryPublisher(self._topics, str(topic), self._clock, self._ring_events, self._publishers)
        self._publishers[publisher.id] = publisher
        return publisher

    async def subscribe(self, topic: Topic) -> MemorySubscription:
        """Subscribe to a topic, from now on."""
        self._require_open()
        subscription = MemorySubscription(self._topics, str(topic), self._buffer_events, self._subscriptions)
        self._subscriptions[subscription] = None
        return subscription

    def lose_next(self, topic: Topic, count: int) -> None:
        """Lose the next ``count`` events of a topic on their way to subscribers; for tests of gap recovery."""
        self._topics.to_lose[str(topic)] = count

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this event bus client is closed", reason="transport.closed")


class MemoryPublisher:
    """Publishes one topic."""

    def __init__(
        self,
        topics: _Topics,
        topic: str,
        clock: Clock,
        ring_events: int,
        siblings: dict[PublisherId, MemoryPublisher],
    ) -> None:
        self._topics = topics
        self._topic = topic
        self._clock = clock
        self._siblings = siblings
        self._sequence = 0
        self._id = topics.new_publisher_id()
        self._ring: deque[EventEnvelope] = deque(maxlen=ring_events)
        topics.rings[self._id] = self._ring

    @property
    def id(self) -> PublisherId:
        """Identity; the sequence counts per publisher."""
        return self._id

    def publish(self, payload: bytes, *, schema: str = "") -> int:
        """Put an event into every subscription's buffer and return its sequence.

        Raises:
            UnavailableError: after ``close``.
        """
        if self._id not in self._siblings:
            raise UnavailableError("this publisher is closed", reason="transport.closed")
        self._sequence += 1
        envelope = EventEnvelope(self._topic, self._id, self._sequence, payload, schema, self._clock.time())
        self._ring.append(envelope)
        self._topics.deliver(envelope)
        return self._sequence

    def offer_snapshot(self, source: SnapshotSource, *, schema: str = "") -> None:
        """Answer whoever asks for a snapshot with what ``source`` returns, in place of an earlier source."""

        async def take() -> EventEnvelope:
            sequence = self._sequence
            return EventEnvelope(self._topic, self._id, sequence, await source(), schema, self._clock.time())

        if self._id in self._siblings:
            self._topics.offers.setdefault(self._topic, {})[self._id] = take

    async def close(self) -> None:
        """Leave the topic; the ring goes with it. Idempotent."""
        self._siblings.pop(self._id, None)
        self._topics.rings.pop(self._id, None)
        self._topics.offers.get(self._topic, {}).pop(self._id, None)


class MemorySubscription:
    """Events of one topic, for one reader."""

    def __init__(
        self, topics: _Topics, topic: str, buffer_events: int, siblings: dict[MemorySubscription, None]
    ) -> None:
        self._topics = topics
        self._topic = topic
        self._siblings = siblings
        self._limit = buffer_events
        self._buffer: deque[EventEnvelope | SequenceGap] = deque()
        self._lost: dict[int, SequenceGap] = {}
        self._wake = asyncio.Event()
        self._closed = False
        topics.subscriptions.setdefault(topic, {})[self] = None

    def __aiter__(self) -> MemorySubscription:
        return self

    async def __anext__(self) -> EventEnvelope | SequenceGap:
        """Return the next event, or the gap that stands before it. Cancelling loses nothing."""
        while not self._closed:
            if self._lost:
                # What was dropped is older than everything in the buffer, so its gap comes first.
                return self._lost.pop(next(iter(self._lost)))
            if self._buffer:
                return self._buffer.popleft()
            self._wake.clear()
            await self._wake.wait()
        raise StopAsyncIteration

    async def replay(self, publisher: PublisherId, first: int, last: int | None = None) -> list[EventEnvelope]:
        """Return events ``first..last`` that are still in the publisher's ring.

        Raises:
            UnavailableError: if the publisher is gone.
        """
        ring = self._topics.rings.get(publisher)
        if ring is None:
            raise UnavailableError(f"publisher {publisher:x} is gone", reason="transport.cannot_connect")
        return [event for event in ring if first <= event.sequence and (last is None or event.sequence <= last)]

    async def snapshots(
        self, *publishers: PublisherId, timeout_s: float = DEFAULT_SNAPSHOT_TIMEOUT_S
    ) -> list[EventEnvelope]:
        """Return the state of publishers, all of the topic if none is named, that offer it in time."""
        offers = self._topics.offers.get(self._topic, {})
        wanted = publishers or tuple(offers)
        asked = [asyncio.ensure_future(offers[each]()) for each in wanted if each in offers]
        limit = asyncio.ensure_future(self._topics.clock.sleep(timeout_s))
        try:
            if asked:
                answered = asyncio.gather(*asked, return_exceptions=True)
                await asyncio.wait((answered, limit), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*asked, limit):
                task.cancel()
        return [task.result() for task in asked if task.done() and not task.cancelled() and not task.exception()]

    async def close(self) -> None:
        """Leave the topic; iteration ends. Idempotent."""
        self._closed = True
        self._siblings.pop(self, None)
        self._topics.unsubscribe(self._topic, self)
        self._buffer.clear()
        self._wake.set()

    def push(self, item: EventEnvelope | SequenceGap) -> None:
        """Buffer an event or gap, dropping the oldest if the buffer is full."""
        if len(self._buffer) >= self._limit:
            self._drop(self._buffer.popleft())
        self._buffer.append(item)
        self._wake.set()

    def _drop(self, item: EventEnvelope | SequenceGap) -> None:
        first, last = (item.first, item.last) if isinstance(item, SequenceGap) else (item.sequence, item.sequence)
        known = self._lost.get(item.publisher_id)
        self._lost[item.publisher_id] = SequenceGap(
            self._topic, item.publisher_id, known.first if known is not None else first, last
        )


class _Topics:
    """What all clients share."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.offers: dict[str, dict[PublisherId, Callable[[], Coroutine[object, object, EventEnvelope]]]] = {}
        self.rings: dict[PublisherId, deque[EventEnvelope]] = {}
        self.subscriptions: dict[str, dict[MemorySubscription, None]] = {}
        self.to_lose: dict[str, int] = {}
        self._ids = itertools.count(1)

    def new_publisher_id(self) -> PublisherId:
        return PublisherId(next(self._ids))

    def deliver(self, envelope: EventEnvelope) -> None:
        item: EventEnvelope | SequenceGap = envelope
        if remaining := self.to_lose.pop(envelope.topic, 0):
            item = SequenceGap(envelope.topic, envelope.publisher_id, envelope.sequence, envelope.sequence)
            if remaining > 1:
                self.to_lose[envelope.topic] = remaining - 1
        for subscription in self.subscriptions.get(envelope.topic, ()):
            subscription.push(item)

    def unsubscribe(self, topic: str, subscription: MemorySubscription) -> None:
        members = self.subscriptions.get(topic, {})
        members.pop(subscription, None)
        if not members:
            self.subscriptions.pop(topic, None)


def create_event_bus(url: str, *, discovery: Discovery, clock: Clock, options: Mapping[str, object]) -> MemoryEventBus:
    """Entry point ``mem`` of ``dynamo_core.event_buses``: return a client of new topics.

    Raises:
        ConfigurationError: if the URL is not ``mem://`` or an option is given.
    """
    require_memory_url(url, options, ())
    return MemoryEventBus(clock=clock)
