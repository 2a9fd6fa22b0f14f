"""TLS contexts that follow their files: a certificate that was renewed is used by the next connection."""

from __future__ import annotations

import ssl

import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError
from dynamo_runtime._tls import TlsFiles

logger = structlog.get_logger(__name__)


class ReloadedTls:
    """Contexts of the newest usable files.

    The files are looked at when a connection begins, at most once an interval, and by content: a time stamp may stay
    the same or change for nothing. Files that cannot be used, half-written ones say, change nothing.

    Args:
        files: The files.
        clock: Time.
        interval_s: Least time between two looks.
    """

    def __init__(self, files: TlsFiles, clock: Clock, interval_s: float) -> None:
        self._files = files
        self._clock = clock
        self._interval_s = interval_s
        self._looked_at_s = clock.monotonic()
        self._digest = files.digest()
        self._client = files.client_context()
        self._server: ssl.SSLContext | None = None
        self._fresh: ssl.SSLContext | None = None

    def client(self) -> ssl.SSLContext:
        """Return the context to dial with."""
        self._look()
        return self._client

    def server(self) -> ssl.SSLContext:
        """Return a context to listen with, which hands each handshake over to the newest.

        Raises:
            ConfigurationError: if there is no certificate to serve with.
        """
        first = self._server = self._files.server_context()
        self._fresh = first
        first.sni_callback = self._choose
        return first

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        del name, context
        self._look()
        if self._fresh is not None and self._fresh is not self._server:
            connection.context = self._fresh

    def _look(self) -> None:
        now_s = self._clock.monotonic()
        if now_s - self._looked_at_s < self._interval_s:
            return
        self._looked_at_s = now_s
        digest = self._files.digest()
        if digest == self._digest:
            return
        try:
            client = self._files.client_context()
            server = self._files.server_context() if self._server is not None else None
        except ConfigurationError as error:
            logger.warning("request_plane.certificate_unusable", error=error.message)
            return
        self._client, self._fresh, self._digest = client, server, digest
        logger.info("request_plane.certificate_reloaded", certificate=self._files.cert_file)
