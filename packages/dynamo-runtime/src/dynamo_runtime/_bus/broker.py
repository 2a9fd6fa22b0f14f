"""The broker of ZeroMQ buses: publishers and subscribers meet at it, so that neither needs to reach the other."""

from __future__ import annotations

import asyncio

import zmq

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._bus._metrics import BrokerMetrics
from dynamo_runtime._bus.options import DEFAULT_MAX_EVENT_BYTES
from dynamo_runtime._bus.sockets import SocketReader, send
from dynamo_runtime._bus.wire import HIGH_WATER_PACKETS, MAX_QUESTION_BYTES, PACKET_BYTES
from dynamo_runtime._plane.address import TcpAddress

_BIND_ATTEMPTS = 32


class ZmqBroker:
    """Passes events on from publishers, at ``port``, to subscribers, at the port after it.

    It keeps nothing: what a subscriber is too slow to take is dropped for it, which the sequence of the publisher shows
    it, and the publisher's ring still has it.

    Args:
        metrics: Counts.
        max_event_bytes: Largest payload of an event; a publisher that sends more is disconnected.
    """

    def __init__(self, metrics: BrokerMetrics | None = None, *, max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES) -> None:
        self._max_packet_bytes = max_event_bytes + PACKET_BYTES
        self._metrics = metrics or BrokerMetrics(None)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._publishers: SocketReader | None = None
        self._subscribers: SocketReader | None = None
        self.port = 0

    def start(self, host: str, port: int) -> None:
        """Bind both ports; 0 takes two free ones that are neighbours.

        Raises:
            ConfigurationError: if they cannot be bound.
        """
        publishers, subscribers = self._bound(host, port)
        self._publishers = SocketReader(publishers, self._on_event)
        self._subscribers = SocketReader(subscribers, self._on_subscription)

    async def close(self) -> None:
        """Stop passing on. Idempotent."""
        for reader in (self._publishers, self._subscribers):
            if reader is not None:
                reader.close()
        self._publishers = self._subscribers = None
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)

    def _on_event(self, frames: list[bytes]) -> None:
        assert self._subscribers is not None
        self._metrics.passed_on()
        send(self._subscribers, frames)

    def _on_subscription(self, frames: list[bytes]) -> None:
        assert self._publishers is not None
        send(self._publishers, frames)

    def _bound(self, host: str, port: int) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        failure = zmq.ZMQError()
        for _ in range(1 if port else _BIND_ATTEMPTS):
            sockets = [self._context.socket(kind) for kind in (zmq.XSUB, zmq.XPUB)]
            try:
                return self._bind(sockets, host, port)
            except zmq.ZMQError as error:
                failure = error
                for socket in sockets:
                    socket.close(0)
        raise ConfigurationError(
            f"the event broker cannot bind {host}:{port} and the port after it: {failure}; give another --port"
        ) from failure

    def _bind(
        self, sockets: list[zmq.Socket[bytes]], host: str, port: int
    ) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        publishers, subscribers = sockets
        for socket in sockets:
            socket.setsockopt(zmq.SNDHWM, HIGH_WATER_PACKETS)
            socket.setsockopt(zmq.RCVHWM, HIGH_WATER_PACKETS)
            socket.setsockopt(zmq.IPV6, int(":" in host))
        publishers.setsockopt(zmq.MAXMSGSIZE, self._max_packet_bytes)
        subscribers.setsockopt(zmq.MAXMSGSIZE, MAX_QUESTION_BYTES)
        # Every subscription is passed on, also a second one to the same topic: each wants to know where it stands.
        subscribers.setsockopt(zmq.XPUB_VERBOSE, 1)
        place = f"[{host}]" if ":" in host else host
        publishers.bind(f"tcp://{place}:{port or '*'}")
        self.port = int(publishers.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        subscribers.bind(f"tcp://{place}:{self.port + 1}")
        return publishers, subscribers


def broker_addresses(text: str) -> tuple[TcpAddress, TcpAddress]:
    """Read ``host:port``; return where publishers and where subscribers connect.

    Raises:
        ConfigurationError: if it is no host and port.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ConfigurationError(f"broker {text!r} is not host:port", param="broker")
    host = host.removeprefix("[").removesuffix("]")
    return TcpAddress(host, int(port)), TcpAddress(host, int(port) + 1)
