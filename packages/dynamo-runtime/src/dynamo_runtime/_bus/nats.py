"""The event bus over NATS: no addresses, no channels in discovery; a topic is a subject.

Packets, sequences, rings and heartbeats are those of the ZeroMQ bus. Whoever subscribes says hello on a subject beside
the topic's, upon which the topic's publishers tell where they stand; so they do when NATS comes back, which shows at
once what was lost while it was away.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsInterest

from dynamo_core.clock import Clock
from dynamo_core.discovery import Discovery, quote_segment
from dynamo_core.errors import BackendProtocolError, UnavailableError
from dynamo_core.events import EventEnvelope, SequenceGap
from dynamo_core.ids import PublisherId, new_publisher_id
from dynamo_core.planes import EventBus, EventBusFactory, Publisher, Subscription, Topic
from dynamo_runtime._bus._metrics import MALFORMED, REPLAYED, BusMetrics
from dynamo_runtime._bus.buffer import EventBuffer
from dynamo_runtime._bus.options import BusOptions, bus_options
from dynamo_runtime._bus.publisher import RingPublisher
from dynamo_runtime._bus.wire import (
    Packet,
    ReplayPart,
    ReplayQuery,
    decode_packet,
    decode_part,
    decode_query,
    encode,
    portions,
)
from dynamo_runtime._plane.nats_link import NatsLink, NatsTarget, nats_target
from dynamo_runtime._plane.timers import wait_within

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

logger = structlog.get_logger(__name__)

EVENTS, HELLO, REPLAY, ANSWER = "dynamo.events", "dynamo.hello", "dynamo.replay", "dynamo.answer"
_OVERHEAD_BYTES = 4096
"""Room that a packet needs beside one event's payload."""

_MAX_SILENCE_FACTOR = 64


class NatsEventBus:
    """Events over NATS.

    Args:
        target: Servers and how to talk to them.
        clock: Time.
        options: Limits and times.
        metrics: Scope to register metrics in.
    """

    def __init__(
        self, target: NatsTarget, *, clock: Clock, options: BusOptions | None = None, metrics: Metrics | None = None
    ) -> None:
        self.clock = clock
        self.options = options or BusOptions()
        self.link = NatsLink(target, clock, lambda: None, self._tell_all)
        self.metrics = BusMetrics(metrics, self._count_buffered, self._count_ring)
        self._publishers: dict[int, RingPublisher] = {}
        self._interests: dict[int, list[NatsInterest]] = {}
        self._subscriptions: set[NatsSubscription] = set()
        self._ready: list[RingPublisher] = []
        self._scheduled = False
        self._heartbeats: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def max_event_bytes(self) -> int:
        """Largest payload of an event: the bus's limit or the server's."""
        return min(self.options.max_event_bytes, self.link.max_payload_bytes - _OVERHEAD_BYTES)

    async def start(self) -> None:
        """Connect. Raises ``UnavailableError`` if NATS cannot be reached within the start-up limit."""
        await self.link.start()
        self._heartbeats = asyncio.get_running_loop().create_task(self._send_heartbeats(), name="event-bus-heartbeats")

    async def close(self) -> None:
        """Close all publishers and subscriptions. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for publisher in list(self._publishers.values()):
            await publisher.close()
        for subscription in list(self._subscriptions):
            await subscription.close()
        if self._heartbeats is not None:
            self._heartbeats.cancel()
            await asyncio.gather(self._heartbeats, return_exceptions=True)
        await self.link.close()

    async def publisher(self, topic: Topic) -> Publisher:
        """Return a new publisher of a topic."""
        self._require_open()
        publisher = RingPublisher(self, str(topic), new_publisher_id(), self._leave)
        publisher.heartbeat_at_s = self.clock.monotonic() + publisher.silence_s

        async def hello(message: Msg) -> None:
            del message
            self._heartbeat(publisher)

        async def answer(message: Msg) -> None:
            self._answer(publisher, message)

        self._publishers[publisher.id] = publisher
        self._interests[publisher.id] = [
            await self.link.subscribe(f"{HELLO}.{quote_segment(publisher.topic)}", hello),
            await self.link.subscribe(f"{REPLAY}.{publisher.id:x}", answer),
        ]
        await self.link.settle()
        return publisher

    async def subscribe(self, topic: Topic) -> Subscription:
        """Subscribe to a topic, from now on: every event published after this returns arrives or shows as a gap."""
        self._require_open()
        subscription = NatsSubscription(self, str(topic))
        self._subscriptions.add(subscription)
        await subscription.join()
        return subscription

    def forget(self, subscription: NatsSubscription) -> None:
        """A subscription is closed."""
        self._subscriptions.discard(subscription)

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

    def remove(self, publisher: RingPublisher) -> None:
        """Forget a publisher and its ring."""
        self._publishers.pop(publisher.id, None)

    async def _leave(self, publisher: RingPublisher) -> None:
        for interest in self._interests.pop(publisher.id, []):
            await self.link.unsubscribe(interest)

    def _send(self, publisher: RingPublisher, packet: Packet) -> None:
        self.link.publish(f"{EVENTS}.{quote_segment(publisher.topic)}", encode(packet))

    def _heartbeat(self, publisher: RingPublisher) -> None:
        # Events of this tick go first, so that the heartbeat does not announce what is still to come.
        if publisher.pending:
            self.flush()
        self._send(publisher, Packet(publisher.id, publisher.sequence))

    def _tell_all(self) -> None:
        for publisher in list(self._publishers.values()):
            self._heartbeat(publisher)

    async def _send_heartbeats(self) -> None:
        while True:
            await self.clock.sleep(self.options.heartbeat_interval_s)
            now_s = self.clock.monotonic()
            for publisher in list(self._publishers.values()):
                if publisher.heartbeat_at_s <= now_s:
                    self._heartbeat(publisher)
                    longest_s = self.options.heartbeat_interval_s * _MAX_SILENCE_FACTOR
                    publisher.silence_s = min(longest_s, publisher.silence_s * 2)
                    publisher.heartbeat_at_s = now_s + publisher.silence_s

    def _answer(self, publisher: RingPublisher, message: Msg) -> None:
        try:
            query = decode_query(message.data)
        except BackendProtocolError:
            self.metrics.add(MALFORMED)
            return
        for part in portions(publisher.ring.select(query.first, query.last)):
            self.link.publish(message.reply, encode(ReplayPart(part, done=False)))
        self.link.publish(message.reply, encode(ReplayPart([], done=True)))

    def _count_buffered(self) -> int:
        return sum(subscription.buffered for subscription in self._subscriptions)

    def _count_ring(self) -> int:
        return sum(len(publisher.ring) for publisher in self._publishers.values())

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this event bus is closed", reason="transport.closed")


class NatsSubscription:
    """Events of one topic, for one reader.

    Args:
        bus: Where it belongs.
        topic: Full topic name.
    """

    def __init__(self, bus: NatsEventBus, topic: str) -> None:
        self._bus = bus
        self._subject = quote_segment(topic)
        self._buffer = EventBuffer(topic, bus.options.buffer_events, bus.metrics)
        self._interest: NatsInterest | None = None

    @property
    def buffered(self) -> int:
        """Events that wait for the reader."""
        return len(self._buffer)

    async def join(self) -> None:
        """Listen, and ask the topic's publishers where they stand."""
        self._interest = await self._bus.link.subscribe(f"{EVENTS}.{self._subject}", self._on_message)
        await self._bus.link.settle()
        self._bus.link.publish(f"{HELLO}.{self._subject}", b"")

    def __aiter__(self) -> NatsSubscription:
        return self

    async def __anext__(self) -> EventEnvelope | SequenceGap:
        """Return the next event, or the gap that stands before it. Cancelling loses nothing."""
        return await self._buffer.next()

    async def replay(self, publisher: PublisherId, first: int, last: int | None = None) -> list[EventEnvelope]:
        """Fetch events ``first..last`` (None: the newest) from the publisher's ring.

        Raises:
            UnavailableError: if the publisher cannot be reached.
        """
        bus = self._bus
        answer = _Answer()
        inbox = f"{ANSWER}.{secrets.token_hex(12)}"
        interest = await bus.link.subscribe(inbox, answer.take)
        try:
            bus.link.publish(f"{REPLAY}.{publisher:x}", encode(ReplayQuery(publisher, first, last)), inbox)
            in_time = await wait_within(bus.clock, bus.options.replay_timeout_s, answer.complete.wait())
        finally:
            await bus.link.unsubscribe(interest)
        if not in_time or not answer.known:
            detail = "is gone" if in_time else f"did not answer within {bus.options.replay_timeout_s:g} s"
            raise UnavailableError(f"publisher {publisher:x} {detail}", reason="transport.cannot_connect")
        bus.metrics.add(REPLAYED, len(answer.events))
        return answer.events

    async def close(self) -> None:
        """Leave the topic; iteration ends. Idempotent."""
        self._buffer.close()
        self._bus.forget(self)
        interest, self._interest = self._interest, None
        if interest is not None:
            await self._bus.link.unsubscribe(interest)

    async def _on_message(self, message: Msg) -> None:
        try:
            packet = decode_packet(message.data)
        except BackendProtocolError:
            self._bus.metrics.add(MALFORMED)
            return
        self._buffer.take(packet)


class _Answer:
    def __init__(self) -> None:
        self.events: list[EventEnvelope] = []
        self.known = True
        self.complete = asyncio.Event()

    async def take(self, message: Msg) -> None:
        try:
            # NATS itself answers with nothing but a status when nobody listens.
            part = decode_part(message.data)
        except BackendProtocolError:
            part = ReplayPart([], done=True, known=False)
        self.events += part.events
        self.known = self.known and part.known
        if part.done:
            self.complete.set()


def nats_event_bus(url: str, *, discovery: Discovery, clock: Clock, options: Mapping[str, object]) -> EventBus:
    """Make the bus for a ``nats://`` URL; see ``NatsOptions`` and ``BusOptions`` for the options.

    Raises:
        ConfigurationError: if the URL or an option is wrong.
    """
    del discovery
    target, others, metrics = nats_target(url, options)
    parsed, _ = bus_options("nats://", others)
    return NatsEventBus(target, clock=clock, options=parsed, metrics=metrics)


if TYPE_CHECKING:
    _BUS: type[EventBus] = NatsEventBus
    _FACTORY: EventBusFactory = nats_event_bus
    _SUBSCRIPTION: type[Subscription] = NatsSubscription
