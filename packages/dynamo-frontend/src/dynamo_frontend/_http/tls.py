"""TLS of the server: certificates that are read again when their files change, with no connection lost."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError

_log = structlog.get_logger(__name__)
RELOAD_EVERY_S = 5.0


class ServerTls:
    """The server's certificate, and the authorities of its clients if they must show one.

    Args:
        cert_path: Certificate with its chain, PEM.
        key_path: Its key, PEM, without a passphrase.
        client_ca_path: Certificates of authorities; with it clients must have a certificate of one of them.

    Raises:
        ConfigurationError: naming the file and what is wrong with it.
    """

    def __init__(self, cert_path: str, key_path: str, client_ca_path: str = "") -> None:
        if not (cert_path and key_path):
            missing = "tls_key_path" if cert_path else "tls_cert_path"
            raise ConfigurationError(f"TLS needs a certificate and its key; give {missing} too", param=missing)
        self._files = (cert_path, key_path, client_ca_path)
        self._stamp = self._stamps()
        self._current = self._load()
        self.context = self._load()
        # The listening socket keeps its context; each handshake asks here for the present one.
        self.context.sni_callback = self._choose

    async def watch(self, clock: Clock) -> None:
        """Read the files again whenever one changes, until cancelled. Damaged ones leave the old in place."""
        while True:
            await clock.sleep(RELOAD_EVERY_S)
            self.reload()

    def reload(self) -> None:
        """Read the files again if one has changed."""
        stamp = self._stamps()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._current = self._load()
        except ConfigurationError as error:
            _log.error("the old certificate stays in place", reason=error.message)
        else:
            _log.info("certificates read", path=self._files[0])

    def _choose(self, connection: Any, server_name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _load(self) -> ssl.SSLContext:
        cert, key, client_ca = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        for param, name in (("tls_cert_path", cert), ("tls_key_path", key), ("tls_client_ca_cert_path", client_ca)):
            if name and not Path(name).is_file():
                raise ConfigurationError(f"{param} {name} does not exist", param=param)
        try:
            # A key with a passphrase would ask for it on the terminal; the empty answer makes that an error.
            context.load_cert_chain(cert, key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"tls_cert_path {cert} and tls_key_path {key} are no certificate with its unencrypted key: {error}",
                param="tls_cert_path",
            ) from error
        if client_ca:
            trust(context, client_ca, "tls_client_ca_cert_path")
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _stamps(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_stamp(name) for name in self._files if name)


def client_context(ca_path: str = "") -> ssl.SSLContext:
    """Return a context for dialling servers that a CA file, or the system, trusts.

    Raises:
        ConfigurationError: if the file holds no certificates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if ca_path:
        trust(context, ca_path, "upstream_ca_path")
    else:
        context.load_default_certs()
    return context


def trust(context: ssl.SSLContext, path: str, param: str) -> None:
    """Let a context trust the authorities of a file.

    Raises:
        ConfigurationError: if the file holds no certificates.
    """
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise ConfigurationError(f"{param} {path} holds no usable PEM certificates: {error}", param=param) from error


def _stamp(name: str) -> tuple[int, int, int]:
    try:
        found = os.stat(name)
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
