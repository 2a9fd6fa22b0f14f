"""What the publishers of a process have to send, whatever carries it: one write a tick, heartbeats, answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from dynamo_core.clock import Clock
from dynamo_core.errors import PayloadTooLargeError, UnavailableError
from dynamo_core.events import EventEnvelope
from dynamo_core.ids import PublisherId
from dynamo_core.planes import SnapshotPublisher, SnapshotSource
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.ring import EventRing
from dynamo_runtime._bus.snapshot import SnapshotOffer
from dynamo_runtime._bus.wire import Packet, ReplayPart, ReplayQuery, portions, topic_frame

_MAX_SILENCE_FACTOR = 64


class RingPublisher:
    """Publishes one topic and keeps the newest events.

    Args:
        outbox: What sends for it.
        topic: Full topic name.
        publisher_id: Identity.
        leave: Tells others that it is gone.
    """

    def __init__(
        self,
        outbox: Outbox,
        topic: str,
        publisher_id: PublisherId,
        leave: Callable[[RingPublisher], Awaitable[None]],
    ) -> None:
        self.topic = topic
        self.frame = topic_frame(topic)
        self.ring = EventRing(outbox.options.ring_events, outbox.options.ring_bytes)
        self.sequence = 0
        self.silence_s = outbox.options.heartbeat_interval_s
        self.heartbeat_at_s = outbox.clock.monotonic() + self.silence_s
        self.pending: list[EventEnvelope] = []
        self.offer: SnapshotOffer | None = None
        self._outbox = outbox
        self._id = publisher_id
        self._leave = leave
        self._closed = False

    @property
    def id(self) -> PublisherId:
        """Identity; sequences count per publisher."""
        return self._id

    def publish(self, payload: bytes, *, schema: str = "") -> int:
        """Queue an event for this tick's write and return its sequence.

        Raises:
            PayloadTooLargeError: if the payload exceeds the bus's limit.
            UnavailableError: after ``close``.
        """
        if self._closed:
            raise UnavailableError("this publisher is closed", reason="transport.closed")
        limit_bytes = self._outbox.max_event_bytes()
        if len(payload) > limit_bytes:
            raise PayloadTooLargeError(f"event of {len(payload)} bytes exceeds the limit of {limit_bytes}")
        self.sequence += 1
        event = self._sealed(self.sequence, payload, schema)
        self.ring.append(event)
        self.pending.append(event)
        if len(self.pending) == 1:
            self._outbox.mark_ready(self)
        return self.sequence

    def offer_snapshot(self, source: SnapshotSource, *, schema: str = "") -> None:
        """Answer whoever asks for a snapshot with what ``source`` returns, in place of an earlier source.

        Raises:
            UnavailableError: after ``close``.
        """
        if self._closed:
            raise UnavailableError("this publisher is closed", reason="transport.closed")

        async def take() -> EventEnvelope:
            sequence = self.sequence
            return self._sealed(sequence, await source(), schema)

        self.offer = SnapshotOffer(take, self._outbox.clock, self._outbox.options)

    async def close(self) -> None:
        """Flush and leave. Idempotent."""
        if not self._closed:
            self._closed = True
            self._outbox.flush()
            self._outbox.remove(self)
            if self.offer is not None:
                await self.offer.close()
            await self._leave(self)

    def _sealed(self, sequence: int, payload: bytes, schema: str) -> EventEnvelope:
        return EventEnvelope(self.topic, self._id, sequence, payload, schema, self._outbox.clock.time())


class Outbox:
    """The publishers of a process.

    Args:
        clock: Time.
        options: Limits and times.
        send: Sends a packet of a publisher to whoever listens now.
        max_event_bytes: Returns the largest payload of an event.
    """

    def __init__(
        self,
        clock: Clock,
        options: BusOptions,
        send: Callable[[RingPublisher, Packet], None],
        max_event_bytes: Callable[[], int],
    ) -> None:
        self.clock = clock
        self.options = options
        self.max_event_bytes = max_event_bytes
        self._send = send
        self._publishers: dict[int, RingPublisher] = {}
        self._ready: list[RingPublisher] = []
        self._scheduled = False
        self._heartbeats: asyncio.Task[None] | None = None

    @property
    def ring_events(self) -> int:
        """Events held for replay."""
        return sum(len(publisher.ring) for publisher in self._publishers.values())

    @property
    def publishers(self) -> list[RingPublisher]:
        """Those that are open."""
        return list(self._publishers.values())

    def start(self) -> None:
        """Begin to send heartbeats."""
        self._heartbeats = asyncio.get_running_loop().create_task(self._send_heartbeats(), name="event-bus-heartbeats")

    async def close(self) -> None:
        """Send what is due and stop. Idempotent."""
        self.flush()
        if self._heartbeats is not None:
            self._heartbeats.cancel()
            await asyncio.gather(self._heartbeats, return_exceptions=True)

    def add(self, publisher: RingPublisher) -> None:
        """Let a publisher send."""
        self._publishers[publisher.id] = publisher

    def remove(self, publisher: RingPublisher) -> None:
        """Forget a publisher and its ring."""
        self._publishers.pop(publisher.id, None)

    def mark_ready(self, publisher: RingPublisher) -> None:
        """A publisher has events for this tick's write."""
        self._ready.append(publisher)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Send what is due."""
        self._scheduled = False
        ready, self._ready = self._ready, []
        for publisher in ready:
            events, publisher.pending = publisher.pending, []
            for part in portions(events):
                self._send(publisher, Packet(publisher.id, part[-1].sequence, part))
            publisher.silence_s = self.options.heartbeat_interval_s
            publisher.heartbeat_at_s = self.clock.monotonic() + publisher.silence_s

    def heartbeat(self, publisher: RingPublisher) -> None:
        """Tell where a publisher stands."""
        self._send(publisher, self.position(publisher))

    def position(self, publisher: RingPublisher) -> Packet:
        """Return where a publisher stands."""
        # Events of this tick go first, so that this does not announce what is still to come.
        if publisher.pending:
            self.flush()
        return Packet(publisher.id, publisher.sequence)

    def answer(self, query: ReplayQuery, reply: Callable[[ReplayPart], object]) -> None:
        """Answer a question, now or once a state has been taken."""
        publisher = self._publishers.get(query.publisher_id)
        if publisher is None:
            reply(ReplayPart([], done=True, known=False))
        elif not query.snapshot:
            for part in portions(publisher.ring.select(query.first, query.last)):
                reply(ReplayPart(part, done=False))
            reply(ReplayPart([], done=True))
        elif publisher.offer is not None:
            publisher.offer.ask(reply)
        else:
            reply(ReplayPart([], done=True))

    async def _send_heartbeats(self) -> None:
        while True:
            await self.clock.sleep(self.options.heartbeat_interval_s)
            now_s = self.clock.monotonic()
            for publisher in self.publishers:
                if publisher.heartbeat_at_s <= now_s:
                    self.heartbeat(publisher)
                    longest_s = self.options.heartbeat_interval_s * _MAX_SILENCE_FACTOR
                    publisher.silence_s = min(longest_s, publisher.silence_s * 2)
                    publisher.heartbeat_at_s = now_s + publisher.silence_s


if TYPE_CHECKING:
    _PUBLISHER: type[SnapshotPublisher] = RingPublisher
