"""The TCP request plane."""

from __future__ import annotations

import asyncio
import functools
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError
from dynamo_core.planes import RequestPlane, RequestPlaneFactory
from dynamo_runtime._plane.address import TcpAddress, UnixAddress, advertised, parse_address, socket_path
from dynamo_runtime._plane.base import StreamPlane
from dynamo_runtime._plane.client import ClientConnection
from dynamo_runtime._plane.options import PlaneOptions, plane_options
from dynamo_runtime._plane.reload import ReloadedTls
from dynamo_runtime._plane.server import ServerConnection

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

_LISTEN_BACKLOG = 1024


class TcpRequestPlane(StreamPlane):
    """Calls over TCP or unix sockets; peers of either kind can be called whatever the plane itself listens on.

    Args:
        url: Where to listen: ``tcp://host:port`` (port 0 takes a free one), or ``unix:///folder`` for a socket of its
            own in that folder, or ``unix:///path.sock`` for that socket.
        clock: Time.
        options: Limits and times.
        metrics: Scope to register metrics in.

    Raises:
        ConfigurationError: if the URL names nothing to listen on, or a TLS file cannot be used.
    """

    def __init__(
        self, url: str, *, clock: Clock, options: PlaneOptions | None = None, metrics: Metrics | None = None
    ) -> None:
        options = options or PlaneOptions()
        super().__init__(self._dial, clock=clock, options=options, metrics=metrics)
        self._listen_on = parse_listen_url(url)
        self._tls = ReloadedTls(options.tls, clock, options.tls_reload_interval_s) if options.tls.on else None
        self._server: asyncio.Server | None = None
        self._socket_path: Path | None = None

    async def close(self) -> None:
        """Close all endpoints, calls and connections. Idempotent."""
        await super().close()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)

    async def listen(self) -> str:
        """Accept callers from now on; return the address."""
        make = functools.partial(ServerConnection, self.state, self.table)
        loop = asyncio.get_running_loop()
        target = self._listen_on
        try:
            if isinstance(target, TcpAddress):
                self._server = await loop.create_server(
                    make,
                    target.host,
                    target.port,
                    backlog=_LISTEN_BACKLOG,
                    ssl=self._tls.server() if self._tls else None,
                    ssl_handshake_timeout=self.state.options.connect_timeout_s if self._tls else None,
                )
                port = self._server.sockets[0].getsockname()[1]
                return str(TcpAddress(advertised(target.host, self.state.options.advertise), port))
            self._socket_path = socket_path(target.path)
            path = os.fspath(self._socket_path)
            self._server = await loop.create_unix_server(make, path, backlog=_LISTEN_BACKLOG)
            return str(UnixAddress(path))
        except OSError as error:
            raise ConfigurationError(f"the request plane cannot listen on {target}: {error}") from error

    async def stop_listening(self) -> None:
        """Accept no more callers. Idempotent."""
        if self._server is not None:
            self._server.close()

    async def _dial(self, address: str) -> ClientConnection:
        target = parse_address(address)
        loop = asyncio.get_running_loop()
        make = functools.partial(ClientConnection, self.state)
        if isinstance(target, UnixAddress):
            return (await loop.create_unix_connection(make, target.path))[1]
        if self._tls is None:
            return (await loop.create_connection(make, target.host, target.port))[1]
        name = self.state.options.tls.server_name or target.host
        return (
            await loop.create_connection(make, target.host, target.port, ssl=self._tls.client(), server_hostname=name)
        )[1]


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
