"""HTTP as a client of a store needs it: one session that can be dropped with everything on it, and streams of lines."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncGenerator, Callable
from typing import Any

import aiohttp
import structlog

from dynamo_core.clock import Clock
from dynamo_runtime._plane.timers import wait_within

logger = structlog.get_logger(__name__)

LOST = (aiohttp.ClientError, OSError, TimeoutError)
"""What a call raises whose server cannot be reached or was lost."""

CLOSE_TIMEOUT_S = 1.0
"""Time that connections get to close before they are left to the kernel."""

_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 10, 5, 3


class HttpConnections:
    """A session that is made when it is needed, and the streams that are being read on it.

    Args:
        clock: Time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._streams: set[aiohttp.ClientResponse] = set()

    def session(self, context: Callable[[], ssl.SSLContext] | None) -> aiohttp.ClientSession:
        """Return the session; ``context`` makes the TLS context of a new one."""
        if self._session is None:
            secure = context() if context is not None else True
            # No limit: each watch holds a connection.
            connector = aiohttp.TCPConnector(limit=0, ssl=secure, socket_factory=_keepalive_socket)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    async def lines(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """Yield a response's lines; ends with an error of ``LOST`` if the connections are dropped meanwhile."""
        self._streams.add(response)
        try:
            held = b""
            async for data in response.content.iter_any():
                *lines, held = (held + data).split(b"\n")
                for line in lines:
                    if line:
                        yield line
        finally:
            self._streams.discard(response)
            # Not released: the server would go on sending.
            response.close()

    async def close(self) -> None:
        """Drop all connections; streams end as lost. Idempotent."""
        for response in self._streams:
            # Closing alone would leave whoever reads it waiting.
            response.content.set_exception(aiohttp.ClientConnectionError("the connection was given up"))
            response.close()
        session, self._session = self._session, None
        # A connection counts as closed once its last bytes have left, which a peer that is cut off never takes.
        if session is not None and not await wait_within(self._clock, CLOSE_TIMEOUT_S, session.close()):
            logger.warning("discovery.connections_left_open")


def _keepalive_socket(info: Any) -> socket.socket:
    """Make a socket that notices a server that vanished without a word: a watch only listens."""
    family, kind, protocol, *_ = info
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", _KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", _KEEPALIVE_PROBES),
    ):
        # Not every system has all three.
        with contextlib.suppress(AttributeError):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made
