"""Addresses of the request plane: ``tcp://host:port`` and ``unix:///path``."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import stat
import urllib.parse
from pathlib import Path

import msgspec

from dynamo_core.errors import ConfigurationError, InvalidRequestError

MAX_SOCKET_PATH_BYTES = 107
SOCKET_SUFFIX = ".sock"


class TcpAddress(msgspec.Struct, frozen=True):
    """A TCP host and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


class UnixAddress(msgspec.Struct, frozen=True):
    """A socket file."""

    path: str

    def __str__(self) -> str:
        return "unix://" + urllib.parse.quote(self.path)


def parse_address(url: str) -> TcpAddress | UnixAddress:
    """Read an address.

    Raises:
        InvalidRequestError: if it is neither ``tcp://host:port`` nor ``unix:///path``.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None:
            return TcpAddress(parts.hostname, parts.port)
    except ValueError as error:
        raise InvalidRequestError(f"address {url!r}: {error}", param="address") from error
    if parts.scheme == "unix" and parts.path.startswith("/"):
        return UnixAddress(urllib.parse.unquote(parts.path))
    raise InvalidRequestError(f"address {url!r} is neither tcp://host:port nor unix:///path", param="address")


def advertised(bound_host: str, advertise: str) -> str:
    """Return the host to tell peers: ``advertise`` if given, else the bound one, else this machine's main address."""
    if advertise:
        return advertise
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(bound_host).is_unspecified:
            return _main_address(socket.AF_INET6 if ":" in bound_host else socket.AF_INET)
    return bound_host


def socket_path(path: str) -> Path:
    """Return the socket file for a plane URL's path: itself if it ends in ``.sock``, else a new one in that folder.

    The folder is made with mode 0700, and socket files that no process listens on are swept from it.

    Raises:
        ConfigurationError: if the folder cannot be used or the path is too long for a socket.
    """
    named = path.endswith(SOCKET_SUFFIX)
    folder = Path(path).parent if named else Path(path)
    target = Path(path) if named else folder / f"{os.getpid():x}-{secrets.token_hex(4)}{SOCKET_SUFFIX}"
    if len(os.fsencode(target)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigurationError(f"socket path {target} exceeds {MAX_SOCKET_PATH_BYTES} bytes; use a shorter one")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for found in (target,) if named else folder.glob(f"*{SOCKET_SUFFIX}"):
            _remove_if_dead(found)
    except OSError as error:
        raise ConfigurationError(f"folder {folder} cannot hold sockets: {error}") from error
    return target


def _remove_if_dead(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            return


def _main_address(family: socket.AddressFamily) -> str:
    # Connecting a datagram socket sends nothing; it only asks the routing table which address would be used.
    target, loopback = ("2001:db8::1", "::1") if family == socket.AF_INET6 else ("192.0.2.1", "127.0.0.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return loopback
