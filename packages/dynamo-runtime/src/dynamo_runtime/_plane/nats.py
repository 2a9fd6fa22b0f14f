"""The request plane over NATS: the TCP plane's connections, with subjects of a broker in place of sockets.

Whoever serves listens on a subject of its own. A caller asks there for a connection; then each side sends to a subject
that only the other listens to, the very bytes that would go through a socket, numbered, since a broker may lose some. A
missing number ends the connection, and with it its calls, as ``transport.disconnected``.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
import urllib.parse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from dynamo_core.clock import Clock
from dynamo_core.errors import InvalidRequestError, UnavailableError
from dynamo_core.planes import RequestPlane, RequestPlaneFactory
from dynamo_runtime._plane.base import StreamPlane
from dynamo_runtime._plane.client import ClientConnection
from dynamo_runtime._plane.connection import Connection
from dynamo_runtime._plane.nats_link import NatsLink, NatsTarget, nats_target
from dynamo_runtime._plane.options import PlaneOptions, plane_options
from dynamo_runtime._plane.pool import cannot_connect
from dynamo_runtime._plane.server import ServerConnection

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

SUBJECTS = "dynamo.calls"
_HEAD = struct.Struct(">QB")
_DATA, _END = 0, 1
_ID_BYTES = 12


class NatsTransport(asyncio.Transport):
    """What a connection takes for its socket.

    Args:
        link: The connection to NATS.
        protocol: Whose bytes it carries.
        out: Subject that the peer listens to.
        piece_bytes: Largest piece of a write that goes into one message.
        left: Called once when it is closed.
    """

    def __init__(
        self, link: NatsLink, protocol: Connection, out: str, piece_bytes: int, left: Callable[[NatsTransport], None]
    ) -> None:
        super().__init__()
        self.subscription: Subscription | None = None
        self._link = link
        self._protocol = protocol
        self._out = out
        self._piece_bytes = piece_bytes
        self._left = left
        self._sent = 0
        self._heard = 0
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue bytes."""
        view = memoryview(data)
        room = True
        for start in range(0, len(view), self._piece_bytes):
            room = self._send(_DATA, bytes(view[start : start + self._piece_bytes]))
        if not room and not self._protocol.paused:
            self._protocol.pause_writing()
            self._link.when_drained(self._protocol.resume_writing)

    def is_closing(self) -> bool:
        """Whether it has been closed."""
        return self._closing

    def close(self) -> None:
        """Tell the peer and close. Idempotent."""
        if not self._closing:
            self._send(_END, b"")
            self.lose(None)

    def abort(self) -> None:
        """Close. Idempotent."""
        self.close()

    def get_write_buffer_size(self) -> int:
        """Return 0: what is queued leaves whatever becomes of this."""
        return 0

    def pause_reading(self) -> None:
        """Do nothing: the subscription's own bound holds, and a message lost to it ends the connection."""

    def resume_reading(self) -> None:
        """Do nothing."""

    async def on_message(self, message: Msg) -> None:
        """Take a message of the peer."""
        if self._closing or len(message.data) < _HEAD.size:
            return
        number, kind = _HEAD.unpack_from(message.data)
        if number != self._heard:
            self.lose(ConnectionError(f"message {self._heard} was lost on its way"))
            return
        self._heard += 1
        if kind == _DATA:
            self._protocol.data_received(message.data[_HEAD.size :])
        else:
            self.lose(None)

    def lose(self, error: Exception | None) -> None:
        """The connection is over."""
        if not self._closing:
            self._closing = True
            self._left(self)
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, error)

    def _send(self, kind: int, data: bytes) -> bool:
        number, self._sent = self._sent, self._sent + 1
        return self._link.publish(self._out, _HEAD.pack(number, kind) + data)


class NatsRequestPlane(StreamPlane):
    """Calls over NATS.

    Args:
        target: Servers and options.
        clock: Time.
        options: Limits and times.
        metrics: Scope to register metrics in.
    """

    def __init__(
        self, target: NatsTarget, *, clock: Clock, options: PlaneOptions | None = None, metrics: Metrics | None = None
    ) -> None:
        super().__init__(self._dial, clock=clock, options=options or PlaneOptions(), metrics=metrics)
        self._link = NatsLink(target, clock, self._lost, lambda: None)
        self._name = secrets.token_hex(_ID_BYTES)
        self._transports: set[NatsTransport] = set()
        self._listener: Subscription | None = None
        self._leaving: set[asyncio.Future[Any]] = set()

    async def start(self) -> None:
        """Connect to NATS. Raises ``UnavailableError`` if that is not possible within the start-up limit."""
        await self._link.start()
        await super().start()

    async def close(self) -> None:
        """Close all endpoints, calls and connections. Idempotent."""
        await super().close()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._link.close()

    async def listen(self) -> str:
        """Listen for callers and return the address."""
        self._listener = await self._link.subscribe(f"{SUBJECTS}.{self._name}", self._on_caller)
        await self._link.settle()
        return f"nats://{self._link.place}/{self._name}"

    async def stop_listening(self) -> None:
        """Accept no more callers."""
        if self._listener is not None:
            await self._link.unsubscribe(self._listener)

    async def _on_caller(self, message: Msg) -> None:
        with contextlib.suppress(UnicodeDecodeError, ValueError, UnavailableError):
            # A longer number would make a subject that ends this process's own connection to NATS.
            number = int(message.data[: _ID_BYTES * 2].decode("ascii"), 16)
            connection = ServerConnection(self.state, self.table)
            await self._attach(connection, _subject("s", number), _subject("c", number))
            self._link.publish(message.reply, b"")

    async def _dial(self, address: str) -> ClientConnection:
        parts = urllib.parse.urlsplit(address)
        if parts.scheme != "nats" or len(parts.path) < 2 or set(" *>.") & set(parts.path):
            raise InvalidRequestError(f"address {address!r} is not nats://host:port/name", param="address")
        if not self._link.connected:
            raise cannot_connect(address, "NATS is away")
        number = secrets.randbits(96)
        connection = ClientConnection(self.state)
        transport = await self._attach(connection, _subject("c", number), _subject("s", number), greet=False)
        # Longer than the pool's own limit, which tells silence from a refusal.
        timeout_s = self.state.options.connect_timeout_s * 2
        try:
            await self._link.request(f"{SUBJECTS}{parts.path.replace('/', '.')}", f"{number:x}".encode(), timeout_s)
            connection.connection_made(transport)
        except BaseException:
            transport.close()
            raise
        return connection

    async def _attach(self, connection: Connection, own: str, peer: str, *, greet: bool = True) -> NatsTransport:
        piece_bytes = max(1, self._link.max_payload_bytes - _HEAD.size)
        transport = NatsTransport(self._link, connection, peer, piece_bytes, self._left)
        transport.subscription = await self._link.subscribe(own, transport.on_message)
        self._transports.add(transport)
        if greet:
            connection.connection_made(transport)
        return transport

    def _left(self, transport: NatsTransport) -> None:
        self._transports.discard(transport)
        if transport.subscription is not None:
            leaving = asyncio.ensure_future(self._link.unsubscribe(transport.subscription))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    def _lost(self) -> None:
        for transport in list(self._transports):
            transport.lose(ConnectionError("the connection to NATS was lost"))


def _subject(side: str, number: int) -> str:
    return f"{SUBJECTS}.{side}.{number:x}"


def nats_request_plane(url: str, *, clock: Clock, options: Mapping[str, object]) -> RequestPlane:
    """Make the plane for a ``nats://`` URL; see ``NatsOptions`` and ``PlaneOptions`` for the options.

    Raises:
        ConfigurationError: if the URL or an option is wrong.
    """
    target, others, metrics = nats_target(url, options)
    parsed, _ = plane_options("nats://", others)
    return NatsRequestPlane(target, clock=clock, options=parsed, metrics=metrics)


if TYPE_CHECKING:
    _PLANE: type[RequestPlane] = NatsRequestPlane
    _FACTORY: RequestPlaneFactory = nats_request_plane
