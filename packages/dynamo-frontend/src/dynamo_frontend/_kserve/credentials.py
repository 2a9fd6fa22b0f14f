"""TLS of the gRPC server: the HTTP server's files, read again for the next handshake when they have changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from dynamo_core.errors import ConfigurationError

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files.

    Attributes:
        cert: Certificate with its chain.
        key: Its key.
        client_ca: Authorities of clients; with it they must show a certificate. Empty for none.
    """

    cert: str
    key: str
    client_ca: str = ""


def server_credentials(grpc: Any, files: TlsFiles) -> Any:
    """Return credentials for grpcio.

    Raises:
        ConfigurationError: if a file cannot be read.
    """
    try:
        current = [_stamps(files), _configuration(grpc, files)]
    except OSError as error:
        raise ConfigurationError(f"a TLS file of the gRPC server cannot be read: {error}") from error

    def fetch() -> Any:
        # Called on grpc's own threads, once a handshake.
        try:
            stamps = _stamps(files)
            if stamps != current[0]:
                current[:] = [stamps, _configuration(grpc, files)]
        except OSError as error:
            _log.error("the old certificate stays in place", reason=str(error))
        return current[1]

    return grpc.dynamic_ssl_server_credentials(current[1], fetch, bool(files.client_ca))


def _configuration(grpc: Any, files: TlsFiles) -> Any:
    pair = (Path(files.key).read_bytes(), Path(files.cert).read_bytes())
    authorities = Path(files.client_ca).read_bytes() if files.client_ca else None
    return grpc.ssl_server_certificate_configuration([pair], authorities)


def _stamps(files: TlsFiles) -> list[tuple[int, int]]:
    found = [os.stat(name) for name in (files.cert, files.key, files.client_ca) if name]
    return [(stat.st_mtime_ns, stat.st_ino) for stat in found]
