"""The sending side over ZeroMQ: the sockets that all publishers of a process share."""

from __future__ import annotations

from typing import cast

import structlog
import zmq

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError
from dynamo_runtime._bus._metrics import MALFORMED, BusMetrics
from dynamo_runtime._bus.broker import broker_addresses
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.outbox import Outbox, RingPublisher
from dynamo_runtime._bus.sockets import SocketReader, send
from dynamo_runtime._bus.wire import (
    HIGH_WATER_PACKETS,
    MAX_QUESTION_BYTES,
    ZMTP_HEARTBEAT_MS,
    ZMTP_TIMEOUT_MS,
    Packet,
    decode_query,
    encode,
)
from dynamo_runtime._plane.address import TcpAddress, advertised

logger = structlog.get_logger(__name__)

CLOSE_LINGER_MS = 500


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
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        listen_on: TcpAddress,
        clock: Clock,
        options: BusOptions,
        metrics: BusMetrics,
    ) -> None:
        self._metrics = metrics
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
        self.outbox = Outbox(clock, options, self._send, lambda: options.max_event_bytes)
        self.outbox.start()

    async def close(self) -> None:
        """Send what is due and close the sockets."""
        await self.outbox.close()
        self._events.close(CLOSE_LINGER_MS)
        self._replays.close(CLOSE_LINGER_MS)

    def _send(self, publisher: RingPublisher, packet: Packet) -> None:
        # Without room at a subscriber the socket drops the packet for it; the sequence shows it the gap.
        send(self._events, [publisher.frame, encode(packet)])

    def _on_subscription(self, frames: list[bytes]) -> None:
        """A subscriber came: tell it where the publishers of its topic stand."""
        if frames[0][:1] != b"\x01":
            return
        wanted = frames[0][1:]
        for publisher in self.outbox.publishers:
            if publisher.frame == wanted:
                self.outbox.heartbeat(publisher)

    def _on_query(self, frames: list[bytes]) -> None:
        try:
            peer, body = frames
            query = decode_query(body)
        except (ValueError, BackendProtocolError):
            self._metrics.add(MALFORMED)
            logger.warning("event_bus.malformed_query")
            return
        self.outbox.answer(query, lambda part: self._reply(peer, encode(part)))

    def _reply(self, peer: bytes, message: bytes) -> None:
        # A state may be ready only after the bus was closed.
        if not self._replays.closed:
            send(self._replays, [peer, message])


def _connected(context: zmq.Context[zmq.Socket[bytes]], broker: str) -> tuple[zmq.Socket[bytes], str]:
    """Return a socket that is connecting to a broker, and where the broker's subscribers connect."""
    publishers, subscribers = broker_addresses(broker)
    socket = context.socket(zmq.XPUB)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_PACKETS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_QUESTION_BYTES)
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
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_QUESTION_BYTES)
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
