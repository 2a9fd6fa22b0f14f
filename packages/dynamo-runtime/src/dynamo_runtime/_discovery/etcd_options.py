"""Options of etcd discovery, and how a URL and a mapping become them."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._options import checked_options, merged_options, require_above_zero
from dynamo_runtime._tls import TlsFiles

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics

DEFAULT_PORT = 2379
_TIMES = (
    "startup_timeout_s",
    "request_timeout_s",
    "retry_interval_s",
    "max_retry_interval_s",
    "probe_interval_s",
    "reset_grace_s",
)


class EtcdOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times, credentials and trust of one client.

    Attributes:
        username: User, if the cluster has authentication on; the URL may give it too.
        password: Password; better given by ``password_file``, which no process list shows.
        password_file: File that holds the password.
        tls: Whether to use TLS without naming any file, trusting the machine's authorities.
        tls_ca: Certificates of trusted authorities, PEM; given, TLS is used.
        tls_cert: Own certificate, PEM, for servers that ask for one.
        tls_key: Key of ``tls_cert``.
        tls_server_name: Name the servers' certificates must have, if it is not the one dialled.
        startup_timeout_s: How long ``start`` tries to reach a server.
        request_timeout_s: Limit of one call to one server.
        retry_interval_s: First pause between attempts to come back; doubles.
        max_retry_interval_s: Longest such pause.
        probe_interval_s: Silence after which the connection is tried.
        reset_grace_s: How long records stay in watches after a store came back without any of them, so that their
            owners can write them again.
    """

    username: str = ""
    password: str = ""
    password_file: str = ""
    tls: bool = False
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    startup_timeout_s: float = 120.0
    request_timeout_s: float = 5.0
    retry_interval_s: float = 0.1
    max_retry_interval_s: float = 2.0
    probe_interval_s: float = 5.0
    reset_grace_s: float = 15.0

    def __post_init__(self) -> None:
        require_above_zero(self, _TIMES)
        self.files.check()

    @property
    def files(self) -> TlsFiles:
        """The TLS files."""
        return TlsFiles(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)


class EtcdTarget(msgspec.Struct, frozen=True):
    """What an ``etcd://`` URL says.

    Attributes:
        servers: Base URL of each server.
        options: Everything else.
    """

    servers: tuple[str, ...]
    options: EtcdOptions


def etcd_target(url: str, options: Mapping[str, object]) -> tuple[EtcdTarget, Metrics | None]:
    """Read ``etcd://[user:password@]host[:port][,host[:port]...][?option=value]``; ``options`` win over the query.

    Raises:
        ConfigurationError: if the URL names no server, or an option is unknown or out of range.
    """
    parts = urllib.parse.urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    if parts.scheme != "etcd" or not hosts or parts.path not in ("", "/"):
        raise ConfigurationError(f"discovery {_shown(url)!r} is not etcd://host:port[,host:port]")
    user, _, password = credentials.partition(":")
    given = {"username": urllib.parse.unquote(user), "password": urllib.parse.unquote(password)}
    fields, metrics = merged_options(url, options)
    fields = {**{name: value for name, value in given.items() if value}, **fields}
    parsed = checked_options(EtcdOptions, fields, f"discovery {_shown(url)}")
    if parsed.password_file:
        parsed = msgspec.structs.replace(parsed, password=_secret(parsed.password_file))
    scheme = "https" if parsed.tls or parsed.files.on else "http"
    servers = tuple(f"{scheme}://{_host_port(url, host)}" for host in hosts.split(","))
    return EtcdTarget(servers, parsed), metrics


def _host_port(url: str, text: str) -> str:
    try:
        parts = urllib.parse.urlsplit(f"//{text}")
        name, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError as error:
        raise ConfigurationError(f"discovery {_shown(url)}: {error}") from error
    if not name:
        raise ConfigurationError(f"discovery {_shown(url)}: a host is empty; give etcd://host:port[,host:port]")
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def _secret(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError(f"password_file {name} cannot be read: {error}", param="password_file") from error


def _shown(url: str) -> str:
    # A URL with a password must not end up in a log.
    head, mark, tail = url.rpartition("@")
    return f"etcd://***@{tail}" if mark and head else url
