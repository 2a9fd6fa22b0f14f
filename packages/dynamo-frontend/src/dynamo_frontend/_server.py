"""The listening socket: binds it, watches time limits, closes it without losing a response."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import Any

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError
from dynamo_frontend._http.limits import HttpLimits
from dynamo_frontend._http.protocol import Application, HttpProtocol
from dynamo_frontend._http.tls import ServerTls

_SWEEP_S = 1.0


class HttpServer:
    """Serves an application on one address.

    Args:
        app: What answers.
        clock: Time of the limits.
        limits: Bounds of each connection.
    """

    def __init__(self, app: Application, clock: Clock, limits: HttpLimits | None = None) -> None:
        self._tls: ServerTls | None = None
        self._tls_watch: asyncio.Task[None] | None = None
        self._app = app
        self._clock = clock
        self.limits = limits or HttpLimits()
        self.closing = False
        self.disconnects = 0
        self._connections: set[HttpProtocol] = set()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()

    @property
    def port(self) -> int:
        """Port that is listened on; 0 before ``start``."""
        sockets = self._server.sockets if self._server is not None else ()
        return int(sockets[0].getsockname()[1]) if sockets else 0

    @property
    def scheme(self) -> str:
        """``http``, or ``https`` with a certificate."""
        return "https" if self._tls is not None else "http"

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    async def start(
        self, host: str, port: int, *, backlog: int = 4096, reuse_port: bool = False, tls: ServerTls | None = None
    ) -> None:
        """Listen on the address, and on no other; with a certificate over TLS only.

        Raises:
            ConfigurationError: if the address cannot be had; the message names the flag to change.
        """
        loop = asyncio.get_running_loop()
        self._tls = tls
        secured: dict[str, Any] = {}
        if tls is not None:
            secured = {"ssl": tls.context, "ssl_handshake_timeout": self.limits.head_timeout_s}
        try:
            self._server = await loop.create_server(
                self.new_connection, host, port, backlog=backlog, reuse_port=reuse_port or None, **secured
            )
        except OSError as error:
            raise ConfigurationError(_explain_bind(host, port, error)) from error
        self._sweeper = loop.create_task(self._sweep(), name="http-time-limits")
        if tls is not None:
            self._tls_watch = loop.create_task(tls.watch(self._clock), name="http-certificates")

    def new_connection(self) -> HttpProtocol:
        """Return a protocol for a new connection."""
        return HttpProtocol(self._app, self, asyncio.get_running_loop())

    def now(self) -> float:
        """Monotonic seconds."""
        return self._clock.monotonic()

    def connection_opened(self, connection: HttpProtocol) -> None:
        """Note a new client."""
        self._connections.add(connection)
        self._idle.clear()

    def connection_closed(self, connection: HttpProtocol, *, mid_response: bool) -> None:
        """Forget a client."""
        self._connections.discard(connection)
        self.disconnects += mid_response
        if not self._connections:
            self._idle.set()

    def stop_accepting(self) -> None:
        """Close the listening socket and idle connections; busy ones close after their response."""
        self.closing = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close_when_idle()

    async def drain(self, timeout_s: float) -> bool:
        """Wait for running responses after ``stop_accepting``; return whether all ended in time."""
        self.stop_accepting()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self._connections

    async def stop(self) -> None:
        """Drop what is still open. Idempotent."""
        self.stop_accepting()
        for task in (self._sweeper, self._tls_watch):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._sweeper = self._tls_watch = None
        for connection in list(self._connections):
            connection.abort()

    async def _sweep(self) -> None:
        # One timer for all connections: a timer each would cost more than the requests of a short stream.
        while True:
            await self._clock.sleep(_SWEEP_S)
            now = self._clock.monotonic()
            for connection in list(self._connections):
                connection.check_time(now)


def _explain_bind(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"HTTP port {port} on {host} is in use; stop what uses it or choose another with --http-port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"HTTP port {port} on {host} needs privileges; choose one above 1023 with --http-port"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"HTTP host {host!r} is no address of this machine; choose one with --http-host"
    return f"HTTP {host}:{port} cannot be listened on: {error}; choose another with --http-host and --http-port"
