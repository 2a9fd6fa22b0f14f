"""The TCP request plane."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError, DeadlineExceededError, UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import (
    DEFAULT_CALL_OPTIONS,
    Call,
    CallOptions,
    RequestHandler,
    RequestPlane,
    RequestPlaneFactory,
    ServedEndpoint,
    StreamReceiver,
)
from dynamo_runtime._plane._metrics import CALLS_OPEN, CALLS_SERVED, CONNECTIONS, PlaneMetrics
from dynamo_runtime._plane.address import TcpAddress, UnixAddress, advertised, socket_path
from dynamo_runtime._plane.client import refused_call
from dynamo_runtime._plane.connection import PlaneState
from dynamo_runtime._plane.options import PlaneOptions, plane_options
from dynamo_runtime._plane.pool import ConnectionPool, split_address
from dynamo_runtime._plane.server import EndpointTable, ServerConnection
from dynamo_runtime._plane.timers import Timers, wait_within

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

_LISTEN_BACKLOG = 1024
_CHECKS_PER_INTERVAL = 4


class TcpRequestPlane:
    """Calls over TCP or unix sockets; peers of either kind can be called whatever the plane itself listens on.

    It listens from the first ``serve`` on: a process that only calls opens no port.

    Args:
        url: Where to listen: ``tcp://host:port`` (port 0 takes a free one), or ``unix:///folder`` for a socket of its
            own in that folder, or ``unix:///path.sock`` for that socket.
        clock: Time.
        options: Limits and times.
        metrics: Scope to register metrics in.
    """

    def __init__(
        self, url: str, *, clock: Clock, options: PlaneOptions | None = None, metrics: Metrics | None = None
    ) -> None:
        self._listen_on = parse_listen_url(url)
        options = options or PlaneOptions()
        self._state = PlaneState(clock, options, PlaneMetrics(metrics), Timers(clock))
        self._table = EndpointTable(clock, options.max_calls)
        self._pool = ConnectionPool(self._state)
        self._server: asyncio.Server | None = None
        self._socket_path: Path | None = None
        self._base_address = ""
        self._listening = asyncio.Lock()
        self._keepalive: asyncio.Task[None] | None = None
        self._closed = False
        self._state.metrics.watch(CONNECTIONS, "Open connections", lambda: len(self._state.connections))
        self._state.metrics.watch(CALLS_SERVED, "Calls being served", lambda: self._table.in_flight)
        self._state.metrics.watch(CALLS_OPEN, "Calls opened by this process that run", lambda: self._pool.calls)

    @property
    def faults(self) -> Mapping[str, int]:
        """Connections and calls ended for a fault, by kind."""
        return self._state.metrics.faults

    @property
    def connects(self) -> int:
        """Connections opened to peers so far."""
        return self._state.metrics.connects

    async def start(self) -> None:
        """Get ready to open and serve calls."""
        if self._keepalive is None and self._state.options.keepalive_interval_s > 0:
            self._keepalive = asyncio.get_running_loop().create_task(
                self._watch_peers(), name="request-plane-keepalive"
            )

    async def close(self) -> None:
        """Close all endpoints, calls and connections. Idempotent."""
        self._closed = True
        for endpoint in self._table.endpoints():
            await endpoint.close()
        if self._server is not None:
            self._server.close()
        await self._pool.close()
        error = UnavailableError("This process closed its request plane.", reason="transport.disconnected")
        gone = [connection.gone for connection in self._state.connections]
        for connection in list(self._state.connections):
            connection.shut(error)
        await wait_within(self._state.clock, self._state.options.connect_timeout_s, _settled(gone))
        for connection in list(self._state.connections):
            connection.abort(error)
        await _settled(gone)
        await self._state.timers.close()
        if self._keepalive is not None:
            self._keepalive.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keepalive
            self._keepalive = None
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)

    async def serve(self, endpoint: EndpointId, handler: RequestHandler, *, schema: str = "") -> ServedEndpoint:
        """Serve an endpoint. A non-empty ``schema`` refuses calls that name another one.

        Raises:
            ConfigurationError: if the plane cannot listen where its URL says.
        """
        async with self._listening:
            self._check_open()
            if self._server is None:
                await self._listen()
        return self._table.add(endpoint, self._base_address, handler, schema)

    async def open(
        self,
        address: str,
        endpoint: EndpointId,
        payload: bytes,
        receiver: StreamReceiver,
        options: CallOptions = DEFAULT_CALL_OPTIONS,
    ) -> Call:
        """Open a call; see ``dynamo_core.planes.RequestPlane.open``."""
        self._check_open()
        base, number = split_address(address)
        deadline_s = options.deadline_s
        connection = self._pool.ready(base)
        if connection is None:
            started_s = self._state.clock.monotonic()
            connection = await self._pool.acquire(base)
            if deadline_s is not None:
                deadline_s -= self._state.clock.monotonic() - started_s
        if deadline_s is not None and deadline_s <= 0:
            return refused_call(receiver, DeadlineExceededError("The deadline passed before the call could leave."))
        return connection.open(f"{endpoint}{number}", payload, receiver, options, deadline_s)

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("This process closed its request plane.", reason="transport.cannot_connect")

    async def _listen(self) -> None:
        make = functools.partial(ServerConnection, self._state, self._table)
        loop = asyncio.get_running_loop()
        target = self._listen_on
        try:
            if isinstance(target, TcpAddress):
                self._server = await loop.create_server(make, target.host, target.port, backlog=_LISTEN_BACKLOG)
                port = self._server.sockets[0].getsockname()[1]
                host = advertised(target.host, self._state.options.advertise)
                self._base_address = str(TcpAddress(host, port))
            else:
                self._socket_path = socket_path(target.path)
                path = os.fspath(self._socket_path)
                self._server = await loop.create_unix_server(make, path, backlog=_LISTEN_BACKLOG)
                self._base_address = str(UnixAddress(path))
        except OSError as error:
            raise ConfigurationError(f"the request plane cannot listen on {target}: {error}") from error

    async def _watch_peers(self) -> None:
        options = self._state.options
        period_s = min(options.keepalive_interval_s, options.keepalive_timeout_s) / _CHECKS_PER_INTERVAL
        checked_at_s = self._state.clock.monotonic()
        while True:
            await self._state.clock.sleep(period_s)
            now_s = self._state.clock.monotonic()
            stood_still = now_s - checked_at_s > options.keepalive_interval_s + period_s
            checked_at_s = now_s
            for connection in list(self._state.connections):
                connection.check_alive(now_s, fresh_start=stood_still)


async def _settled(gone: list[asyncio.Future[None]]) -> None:
    if gone:
        await asyncio.wait(gone)


def parse_listen_url(url: str) -> TcpAddress | UnixAddress:
    """Read a plane's URL, its query left aside.

    Raises:
        ConfigurationError: if it names nothing to listen on.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname:
            return TcpAddress(parts.hostname, parts.port or 0)
    except ValueError as error:
        raise ConfigurationError(f"request plane {url!r}: {error}") from error
    if parts.scheme == "unix" and len(parts.path) > 1:
        return UnixAddress(urllib.parse.unquote(parts.path))
    raise ConfigurationError(f"request plane {url!r} is neither tcp://host:port nor unix:///folder")


def tcp_request_plane(url: str, *, clock: Clock, options: Mapping[str, object]) -> RequestPlane:
    """Make the plane for ``tcp://`` and ``unix://`` URLs; see ``PlaneOptions`` for the options.

    Raises:
        ConfigurationError: if the URL or an option is wrong.
    """
    parsed, metrics = plane_options(url, options)
    return TcpRequestPlane(url, clock=clock, options=parsed, metrics=metrics)


unix_request_plane = tcp_request_plane

if TYPE_CHECKING:
    _PLANE: type[RequestPlane] = TcpRequestPlane
    _FACTORY: RequestPlaneFactory = tcp_request_plane
