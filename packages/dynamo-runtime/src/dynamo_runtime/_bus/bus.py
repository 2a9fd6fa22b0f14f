"""The ZeroMQ event bus, without a broker or through one."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING

import zmq

from dynamo_core.clock import Clock
from dynamo_core.discovery import Discovery, EventChannel, Lease
from dynamo_core.errors import ConfigurationError, DynamoError, UnavailableError
from dynamo_core.ids import new_publisher_id
from dynamo_core.planes import EventBus, EventBusFactory, Publisher, Subscription, Topic
from dynamo_core.wire import EVENT_CHANNEL
from dynamo_runtime._bus._metrics import BusMetrics
from dynamo_runtime._bus.broker import broker_addresses
from dynamo_runtime._bus.links import BusState
from dynamo_runtime._bus.options import BusOptions, bus_options
from dynamo_runtime._bus.outbox import RingPublisher
from dynamo_runtime._bus.publisher import PublisherHub
from dynamo_runtime._bus.subscription import ZmqSubscription
from dynamo_runtime._plane.address import TcpAddress

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics


class ZmqEventBus:
    """Events over TCP, straight from publisher to subscriber or through a broker.

    It binds from the first ``publisher`` on: a process that only subscribes opens no port.

    Args:
        url: Where publishers bind: ``zmq://host:port``; port 0 takes a free one.
        discovery: Where publishers are found. Must be started.
        clock: Time.
        options: Limits and times.
        metrics: Scope to register metrics in.
    """

    def __init__(
        self,
        url: str,
        *,
        discovery: Discovery,
        clock: Clock,
        options: BusOptions | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._listen_on = parse_bus_url(url)
        if options is not None and options.broker:
            broker_addresses(options.broker)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        counts = BusMetrics(metrics, self._count_buffered, self._count_ring)
        self._state = BusState(self._context, discovery, clock, options or BusOptions(), counts)
        self._hub: PublisherHub | None = None
        self._lease: Lease | None = None
        self._publishers: dict[int, RingPublisher] = {}
        self._opening = asyncio.Lock()
        self._closed = False

    @property
    def counts(self) -> Mapping[str, int]:
        """Lost, malformed and replayed events and states so far, by metric name."""
        return self._state.metrics.counts

    async def start(self) -> None:
        """Do nothing: sockets open when they are used."""

    async def close(self) -> None:
        """Close all publishers and subscriptions. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for publisher in list(self._publishers.values()):
            await publisher.close()
        for subscription in list(self._state.subscriptions):
            await subscription.close()
        if self._lease is not None:
            # Discovery out of reach must not keep the process from leaving; the lease lapses by itself.
            with contextlib.suppress(DynamoError):
                await self._lease.revoke()
        if self._hub is not None:
            await self._hub.close()
        # Ending the context waits for the sockets' last messages, so it happens off the loop.
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)

    async def publisher(self, topic: Topic) -> Publisher:
        """Return a new publisher of a topic; it is in discovery when this returns.

        Raises:
            ConfigurationError: if the bus cannot bind where its URL says.
            UnavailableError: if discovery cannot be reached.
        """
        self._require_open()
        async with self._opening:
            hub = self._hub = self._hub or self._bind()
            if self._lease is None or not self._lease.valid:
                self._lease = await self._state.discovery.lease()
        publisher = RingPublisher(hub.outbox, str(topic), new_publisher_id(), self._leave)
        hub.outbox.add(publisher)
        self._publishers[publisher.id] = publisher
        channel = EventChannel(publisher.topic, publisher.id, hub.address, hub.replay_address)
        try:
            await self._state.discovery.put(channel.key, EVENT_CHANNEL.encode(channel), lease=self._lease)
        except BaseException:
            hub.outbox.remove(publisher)
            del self._publishers[publisher.id]
            raise
        return publisher

    async def subscribe(self, topic: Topic) -> Subscription:
        """Subscribe to a topic, from now on: every event published after this returns arrives or shows as a gap."""
        self._require_open()
        subscription = ZmqSubscription(self._state, str(topic))
        self._state.subscriptions[subscription] = None
        try:
            await subscription.join()
        except BaseException:
            await subscription.close()
            raise
        return subscription

    def _bind(self) -> PublisherHub:
        try:
            state = self._state
            return PublisherHub(self._context, self._listen_on, state.clock, state.options, state.metrics)
        except zmq.ZMQError as error:
            raise ConfigurationError(f"the event bus cannot bind {self._listen_on}: {error}") from error

    async def _leave(self, publisher: RingPublisher) -> None:
        self._publishers.pop(publisher.id, None)
        channel = EventChannel(publisher.topic, publisher.id, "")
        # Without discovery the record goes when the lease does.
        with contextlib.suppress(DynamoError):
            await self._state.discovery.delete(channel.key)

    def _count_buffered(self) -> int:
        return sum(subscription.buffered for subscription in self._state.subscriptions)

    def _count_ring(self) -> int:
        return self._hub.outbox.ring_events if self._hub is not None else 0

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError("this event bus is closed", reason="transport.closed")


def parse_bus_url(url: str) -> TcpAddress:
    """Read a bus's URL, its query left aside.

    Raises:
        ConfigurationError: if it is not ``zmq://host:port``.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == "zmq" and parts.hostname:
            return TcpAddress(parts.hostname, parts.port or 0)
    except ValueError as error:
        raise ConfigurationError(f"event bus {url!r}: {error}") from error
    raise ConfigurationError(f"event bus {url!r} is not zmq://host:port")


def zmq_event_bus(url: str, *, discovery: Discovery, clock: Clock, options: Mapping[str, object]) -> EventBus:
    """Make the bus for a ``zmq://`` URL; see ``BusOptions`` for the options.

    Raises:
        ConfigurationError: if the URL or an option is wrong.
    """
    parsed, metrics = bus_options(url, options)
    return ZmqEventBus(url, discovery=discovery, clock=clock, options=parsed, metrics=metrics)


if TYPE_CHECKING:
    _BUS: type[EventBus] = ZmqEventBus
    _FACTORY: EventBusFactory = zmq_event_bus
