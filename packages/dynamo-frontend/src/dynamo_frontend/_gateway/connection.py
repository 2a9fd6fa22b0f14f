"""Connections to one upstream: an HTTP/1.1 client that pushes what arrives, and a pool of idle connections."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from dynamo_core.errors import BackendProtocolError, ConfigurationError, DynamoError, UnavailableError

MAX_IDLE_CONNECTIONS = 256
MAX_HEAD_BYTES = 64 * 1024
_CONNECT_TIMEOUT_S = 5.0


class ResponseReceiver(Protocol):
    """Where an upstream's response goes. Called on the event loop; ``on_end`` or ``on_failure`` comes once, last."""

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        """The head arrived."""
        ...

    def on_body(self, data: bytes) -> None:
        """A piece of the body arrived."""
        ...

    def on_end(self) -> None:
        """The response is complete."""
        ...

    def on_failure(self, error: DynamoError) -> None:
        """The response will not be complete."""
        ...


class UpstreamConnection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, pool: UpstreamPool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._receiver: ResponseReceiver | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._head_done = False
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the socket up."""
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the response: cleanly only if its end is the connection's end."""
        self.closed = True
        self._pool.forget(self)
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        delimited = "content-length" in self._headers or "chunked" in self._headers.get("transfer-encoding", "")
        if self._head_done and not delimited and exc is None:
            receiver.on_end()
        else:
            receiver.on_failure(UnavailableError("The engine closed the connection.", reason="transport.disconnected"))

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(BackendProtocolError(f"The engine's response is not valid HTTP/1.1: {error}"))

    def send(self, request: bytes, receiver: ResponseReceiver) -> None:
        """Send a request whose response goes to the receiver."""
        assert self._transport is not None
        assert self._receiver is None, "one request at a time"
        self._receiver = receiver
        self._headers = {}
        self._head_bytes = 0
        self._head_done = False
        self._transport.write(request)

    def abort(self) -> None:
        """Drop the connection; the receiver hears nothing more."""
        self._receiver = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Stop reading: whoever takes the response does not keep up."""
        if self._transport is not None and not self.closed:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self.closed:
            self._transport.resume_reading()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect one header."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("response head is too large")
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Hand over the head."""
        self._head_done = True
        if self._receiver is not None:
            self._receiver.on_head(self._parser.get_status_code(), self._headers)

    def on_body(self, body: bytes) -> None:
        """Hand over a piece of the body."""
        if self._receiver is not None:
            self._receiver.on_body(body)

    def on_message_complete(self) -> None:
        """Give the connection back before the end is told, so that the next request finds it."""
        receiver, self._receiver = self._receiver, None
        if self._parser.should_keep_alive() and not self.closed:
            self._pool.release(self)
        elif self._transport is not None:
            self._transport.close()
        if receiver is not None:
            receiver.on_end()

    def _fail(self, error: DynamoError) -> None:
        receiver, self._receiver = self._receiver, None
        if self._transport is not None:
            self._transport.abort()
        if receiver is not None:
            receiver.on_failure(error)


class UpstreamPool:
    """Connections to one upstream.

    Args:
        url: ``http://host:port`` or ``https://host:port`` with an optional path prefix.
        tls: Whom to trust behind ``https``.

    Raises:
        ConfigurationError: if it is no such URL.
    """

    def __init__(self, url: str, tls: ssl.SSLContext) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigurationError(
                f"--upstream {url!r} is not http://host:port or https://host:port; give the engine's base URL"
            )
        self.host = parts.hostname
        self._tls = tls if parts.scheme == "https" else None
        self.port = parts.port or (443 if self._tls is not None else 80)
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.authority = parts.netloc.rpartition("@")[2]
        self._idle: deque[UpstreamConnection] = deque(maxlen=MAX_IDLE_CONNECTIONS)

    async def acquire(self) -> UpstreamConnection:
        """Return an idle connection, or a new one.

        Raises:
            UnavailableError: if the upstream cannot be reached.
        """
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self), self.host, self.port, ssl=self._tls
                )
        except ssl.SSLError as error:
            raise UnavailableError(
                f"The engine at {self.authority} has no certificate that is trusted here: {error.reason}.",
                reason="transport.cannot_connect",
            ) from error
        except (OSError, TimeoutError) as error:
            raise UnavailableError(
                f"The engine at {self.authority} cannot be reached.", reason="transport.cannot_connect"
            ) from error
        return connection

    def release(self, connection: UpstreamConnection) -> None:
        """Take a connection back."""
        if len(self._idle) == MAX_IDLE_CONNECTIONS:
            self._idle.popleft().abort()
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """Drop a connection that closed."""
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close idle connections."""
        for connection in list(self._idle):
            connection.abort()
        self._idle.clear()
