"""Options of the request plane, and how a URL and a mapping become them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._options import checked_options, merged_options, require_above_zero
from dynamo_runtime._tls import TlsFiles

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics


_ABOVE_ZERO = (
    "max_frame_bytes",
    "max_buffer_items",
    "max_calls",
    "max_queue_age_s",
    "max_connections",
    "path_retry_interval_s",
    "connect_timeout_s",
    "tls_reload_interval_s",
)


class PlaneOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits and times of one plane.

    Attributes:
        advertise: Host that peers reach this process under; needed if the detected one is not reachable.
        max_frame_bytes: Largest frame taken, hence of a payload or item.
        max_buffer_items: Items that one call may send beyond its credit before it is ended; the same on both sides.
        max_calls: Calls served at once, over all endpoints.
        max_queued_calls: Calls that may wait for a place; more are refused as ``capacity.worker_overloaded``.
        max_queue_age_s: Longest wait for a place; then the call is refused as well.
        max_connections: Connections accepted at once.
        connect_timeout_s: Limit of connecting, greeting included.
        path_retry_interval_s: Time for which an address is not dialled that did not answer within that limit; doubles
            with each failure up to 16 times as long. One that refuses is dialled again at once.
        keepalive_interval_s: Silence after which a peer is asked for a sign of life; 0 never asks.
        keepalive_timeout_s: Time it has to answer. It must outlast the longest stall of a healthy peer's event loop.
        tls_ca: Certificates of the authorities whose peers are trusted, PEM. Callers must then prove themselves too.
        tls_cert: Own certificate with its chain, PEM. With it, or ``tls_ca``, all TCP connections use TLS.
        tls_key: Key of ``tls_cert``.
        tls_server_name: Name the servers' certificates must have, if it is not the host that is dialled.
        tls_reload_interval_s: How often the files are looked at for a new certificate.
    """

    advertise: str = ""
    max_frame_bytes: int = 32 << 20
    max_buffer_items: int = 4096
    max_calls: int = 65536
    max_queued_calls: int = 0
    max_queue_age_s: float = 1.0
    max_connections: int = 4096
    connect_timeout_s: float = 3.0
    path_retry_interval_s: float = 1.0
    keepalive_interval_s: float = 10.0
    keepalive_timeout_s: float = 20.0
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    tls_reload_interval_s: float = 30.0

    def __post_init__(self) -> None:
        require_above_zero(self, _ABOVE_ZERO)
        if self.max_queued_calls < 0:
            raise ConfigurationError(
                f"max_queued_calls is {self.max_queued_calls}; give 0 or more", param="max_queued_calls"
            )
        self.tls.check()

    @property
    def tls(self) -> TlsFiles:
        """The TLS files."""
        return TlsFiles(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)


def plane_options(url: str, options: Mapping[str, object]) -> tuple[PlaneOptions, Metrics | None]:
    """Merge a URL's query with ``options``, which win; ``metrics`` among them is the registry scope to use.

    Raises:
        ConfigurationError: if an option is unknown or out of range.
    """
    fields, metrics = merged_options(url, options)
    return checked_options(PlaneOptions, fields, f"request plane {url}"), metrics
