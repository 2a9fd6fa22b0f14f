"""The sending side: one socket for all publishers of a process, one write a tick, rings that can be replayed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol, cast

import structlog
import zmq

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, PayloadTooLargeError, UnavailableError
from dynamo_core.events import EventEnvelope
from dynamo_core.ids import PublisherId
from dynamo_core.planes import Publisher
from dynamo_runtime._bus._metrics import MALFORMED, BusMetrics
from dynamo_runtime._bus.broker import broker_addresses
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.sockets import SocketReader, send
from dynamo_runtime._bus.wire import (
    HIGH_WATER_PACKETS,
    ZMTP_HEARTBEAT_MS,
    ZMTP_TIMEOUT_MS,
    Packet,
    ReplayPart,
    ReplayQuery,
    decode_query,
    encode,
    portions,
    topic_frame,
)
from dynamo_runtime._plane.address import TcpAddress, advertised

logger = structlog.get_logger(__name__)

CLOSE_LINGER_MS = 500
_MAX_SILENCE_FACTOR = 64


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


class PublisherOwner(Protocol):
    """What sends for the publishers of a process."""

    @property
    def options(self) -> BusOptions:
        """Limits and times."""
        ...

    @property
    def clock(self) -> Clock:
        """Time."""
        ...

    @property
    def max_event_bytes(self) -> int:
        """Largest payload of an event."""
        ...

    def mark_ready(self, publisher: RingPublisher) -> None:
        """A publisher has events for this tick's write."""
        ...

    def flush(self) -> None:
        """Send what is due."""
        ...

    def remove(self, publisher: RingPublisher) -> None:
        """Forget a publisher and its ring."""
        ...


class RingPublisher:
    """Publishes one topic and keeps the newest events.

    Args:
        hub: The process's sending side.
        topic: Full topic name.
        publisher_id: Identity.
        leave: Takes the publisher out of discovery.
    """

    def __init__(
        self,
        hub: PublisherOwner,
        topic: str,
        publisher_id: PublisherId,
        leave: Callable[[RingPublisher], Awaitable[None]],
    ) -> None:
        self.topic = topic
        self.frame = topic_frame(topic)
        self.ring = EventRing(hub.options.ring_events, hub.options.ring_bytes)
        self.sequence = 0
        self.silence_s = hub.options.heartbeat_interval_s
        self.heartbeat_at_s = 0.0
        self.pending: list[EventEnvelope] = []
        self._hub = hub
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
        hub = self._hub
        if len(payload) > hub.max_event_bytes:
            raise PayloadTooLargeError(f"event of {len(payload)} bytes exceeds the limit of {hub.max_event_bytes}")
        self.sequence += 1
        event = EventEnvelope(self.topic, self._id, self.sequence, payload, schema, hub.clock.time())
        self.ring.append(event)
        self.pending.append(event)
        if len(self.pending) == 1:
            hub.mark_ready(self)
        return self.sequence

    async def close(self) -> None:
        """Flush and leave. Idempotent."""
        if not self._closed:
            self._closed = True
            self._hub.flush()
            self._hub.remove(self)
            await self._leave(self)


class PublisherHub:
    """The sockets that all publishers of a process share.

    Args:
        context: ZeroMQ context.
        listen_on: Address to bind.
        clock: Time.
        options: Limits and times.
        metrics: Counts.

    Raises:
        zmq.ZMQError: if the address cannot be bound.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], listen_on: TcpAddress, clock: Clock, options: BusOptions
    ) -> None:
        self.clock = clock
        self.options = options
        self._publishers: dict[int, RingPublisher] = {}
        self._ready: list[RingPublisher] = []
        self._scheduled = False
        self._loop = asyncio.get_running_loop()
        self._metrics: BusMetrics | None = None
        host = advertised(listen_on.host, options.advertise)
        if options.broker:
            events, self.address = _connected(context, options.broker)
        else:
            events, self.address = _bound(context, zmq.XPUB, listen_on, host)
        try:
            replays, self.replay_address = _bound(context, zmq.ROUTER, TcpAddress(listen_on.host, 0), host)
        except zmq.ZMQError:
            events.close(0)
            raise
        self._events = SocketReader(events, self._on_subscription)
        self._replays = SocketReader(replays, self._on_query)
        self._task = self._loop.create_task(self._send_heartbeats(), name="event-bus-heartbeats")

    @property
    def max_event_bytes(self) -> int:
        """Largest payload of an event."""
        return self.options.max_event_bytes

    @property
    def ring_events(self) -> int:
        """Events held for replay."""
        return sum(len(publisher.ring) for publisher in self._publishers.values())

    def count_into(self, metrics: BusMetrics) -> None:
        """Count malformed queries there."""
        self._metrics = metrics

    def add(self, publisher: RingPublisher) -> None:
        """Let a publisher send."""
        publisher.heartbeat_at_s = self.clock.monotonic() + publisher.silence_s
        self._publishers[publisher.id] = publisher

    def remove(self, publisher: RingPublisher) -> None:
        """Forget a publisher and its ring."""
        self._publishers.pop(publisher.id, None)

    def mark_ready(self, publisher: RingPublisher) -> None:
        """A publisher has events for this tick's write."""
        self._ready.append(publisher)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what is due."""
        self._scheduled = False
        ready, self._ready = self._ready, []
        for publisher in ready:
            events, publisher.pending = publisher.pending, []
            for part in portions(events):
                # Without room at a subscriber the socket drops the packet for it; the sequence shows it the gap.
                send(self._events, [publisher.frame, encode(Packet(publisher.id, part[-1].sequence, part))])
            publisher.silence_s = self.options.heartbeat_interval_s
            publisher.heartbeat_at_s = self.clock.monotonic() + publisher.silence_s

    async def close(self) -> None:
        """Send what is due and close the sockets."""
        self.flush()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._events.close(CLOSE_LINGER_MS)
        self._replays.close(CLOSE_LINGER_MS)

    def _heartbeat(self, publisher: RingPublisher) -> None:
        # Events of this tick go first, so that the heartbeat does not announce what is still to come.
        if publisher.pending:
            self.flush()
        send(self._events, [publisher.frame, encode(Packet(publisher.id, publisher.sequence))])

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

    def _on_subscription(self, frames: list[bytes]) -> None:
        """A subscriber came: tell it where the publishers of its topic stand."""
        if frames[0][:1] != b"\x01":
            return
        wanted = frames[0][1:]
        for publisher in list(self._publishers.values()):
            if publisher.frame == wanted:
                self._heartbeat(publisher)

    def _on_query(self, frames: list[bytes]) -> None:
        try:
            peer, body = frames
            query = decode_query(body)
        except (ValueError, BackendProtocolError):
            if self._metrics is not None:
                self._metrics.add(MALFORMED)
            logger.warning("event_bus.malformed_query")
            return
        for part in self._answer(query):
            send(self._replays, [peer, encode(part)])

    def _answer(self, query: ReplayQuery) -> list[ReplayPart]:
        publisher = self._publishers.get(query.publisher_id)
        if publisher is None:
            return [ReplayPart([], done=True, known=False)]
        parts = [ReplayPart(part, done=False) for part in portions(publisher.ring.select(query.first, query.last))]
        return [*parts, ReplayPart([], done=True)]


def _connected(context: zmq.Context[zmq.Socket[bytes]], broker: str) -> tuple[zmq.Socket[bytes], str]:
    """Return a socket that is connecting to a broker, and where the broker's subscribers connect."""
    publishers, subscribers = broker_addresses(broker)
    socket = context.socket(zmq.XPUB)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_PACKETS)
    socket.setsockopt(zmq.XPUB_VERBOSE, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, ZMTP_HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, ZMTP_TIMEOUT_MS)
    socket.setsockopt(zmq.IPV6, 1)
    socket.connect(str(publishers))
    return socket, str(subscribers)


def _bound(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, listen_on: TcpAddress, advertise: str
) -> tuple[zmq.Socket[bytes], str]:
    socket = context.socket(kind)
    try:
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_PACKETS)
        socket.setsockopt(zmq.IPV6, int(":" in listen_on.host))
        if kind == zmq.XPUB:
            # Every subscription is reported, also a second one to the same topic: each wants to know where it stands.
            socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        host = f"[{listen_on.host}]" if ":" in listen_on.host else listen_on.host
        socket.bind(f"tcp://{host}:{listen_on.port or '*'}")
    except zmq.ZMQError:
        socket.close(0)
        raise
    bound = cast("bytes", socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
    return socket, str(TcpAddress(advertise, int(bound.rpartition(":")[2])))


if TYPE_CHECKING:
    _PUBLISHER: type[Publisher] = RingPublisher
