"""The event bus over NATS: no addresses, no channels in discovery; a topic is a subject.

Packets, sequences, rings and heartbeats are those of the ZeroMQ bus. Whoever subscribes says hello on a subject beside
the topic's, upon which the topic's publishers tell where they stand; so they do when NATS comes back, which shows at
once what was lost while it was away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsInterest

from dynamo_core.clock import Clock
from dynamo_core.discovery import Discovery, quote_segment
from dynamo_core.errors import BackendProtocolError, UnavailableError
from dynamo_core.ids import new_publisher_id
from dynamo_core.planes import EventBus, EventBusFactory, Publisher, Subscription, Topic
from dynamo_runtime._bus._metrics import MALFORMED, BusMetrics
from dynamo_runtime._bus.nats_subscription import EVENTS, HELLO, REPLAY, NatsSubscription
from dynamo_runtime._bus.options import BusOptions, bus_options
from dynamo_runtime._bus.outbox import Outbox, RingPublisher
from dynamo_runtime._bus.wire import Packet, decode_query, encode
from dynamo_runtime._plane.nats_link import NatsLink, NatsTarget, nats_target

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

_OVERHEAD_BYTES = 4096
"""Room that a packet needs beside one event's payload."""


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
        self.metrics = BusMetrics(metrics, self._count_buffered, lambda: self._outbox.ring_events)
        self._outbox = Outbox(clock, self.options, self._send, self._max_event_bytes)
        self._interests: dict[int, list[NatsInterest]] = {}
        self._subscriptions: set[NatsSubscription] = set()
        self._closed = False

    async def start(self) -> None:
        """Connect. Raises ``UnavailableError`` if NATS cannot be reached within the start-up limit."""
        await self.link.start()
        self._outbox.start()

    async def close(self) -> None:
        """Close all publishers and subscriptions. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for publisher in self._outbox.publishers:
            await publisher.close()
        for subscription in list(self._subscriptions):
            await subscription.close()
        await self._outbox.close()
        await self.link.close()

    async def publisher(self, topic: Topic) -> Publisher:
        """Return a new publisher of a topic."""
        self._require_open()
        publisher = RingPublisher(self._outbox, str(topic), new_publisher_id(), self._leave)

        async def hello(message: Msg) -> None:
            # Whoever calls the roll alone wants to hear.
            if message.reply:
                self.link.publish(message.reply, encode(self._outbox.position(publisher)))
            else:
                self._outbox.heartbeat(publisher)

        self._outbox.add(publisher)
        self._interests[publisher.id] = [
            await self.link.subscribe(f"{HELLO}.{quote_segment(publisher.topic)}", hello),
            await self.link.subscribe(f"{REPLAY}.{publisher.id:x}", self._on_query),
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

    async def _leave(self, publisher: RingPublisher) -> None:
        for interest in self._interests.pop(publisher.id, []):
            await self.link.unsubscribe(interest)

    async def _on_query(self, message: Msg) -> None:
        try:
            query = decode_query(message.data)
        except BackendProtocolError:
            self.metrics.add(MALFORMED)
            return
        self._outbox.answer(query, lambda part: self.link.publish(message.reply, encode(part)))

    def _send(self, publisher: RingPublisher, packet: Packet) -> None:
        self.link.publish(f"{EVENTS}.{quote_segment(publisher.topic)}", encode(packet))

    def _tell_all(self) -> None:
        for publisher in self._outbox.publishers:
            self._outbox.heartbeat(publisher)

    def _max_event_bytes(self) -> int:
        """Return the largest payload of an event: the bus's limit or the server's."""
        return min(self.options.max_event_bytes, self.link.max_payload_bytes - _OVERHEAD_BYTES)

    def _count_buffered(self) -> int:
        return sum(subscription.buffered for subscription in self._subscriptions)

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this event bus is closed", reason="transport.closed")


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
