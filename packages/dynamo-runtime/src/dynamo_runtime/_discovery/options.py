"""Options of file discovery, and how a URL and a mapping become them."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from dynamo_core.errors import ConfigurationError
from dynamo_runtime._options import checked_options, merged_options, require_above_zero

if TYPE_CHECKING:
    from dynamo_core.telemetry import Metrics


class FileDiscoveryOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times of one client.

    Attributes:
        tend_interval_s: Longest time between two looks at leases; short-lived leases are looked at more often.
        poll_interval_s: Time between two full scans while something is watched, should a file notification be lost.
        lock_timeout_s: Limit of waiting for the directory's lock.
    """

    tend_interval_s: float = 1.0
    poll_interval_s: float = 5.0
    lock_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        require_above_zero(self, self.__struct_fields__)


def file_options(url: str, options: Mapping[str, object]) -> tuple[Path, FileDiscoveryOptions, Metrics | None]:
    """Return the directory of a URL, and its query merged with ``options``, which win.

    Raises:
        ConfigurationError: if the URL names no absolute directory, or an option is unknown or out of range.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "file" or parts.netloc or len(parts.path) < 2:
        raise ConfigurationError(f"discovery {url!r} is not file:///absolute/directory")
    fields, metrics = merged_options(url, options)
    parsed = checked_options(FileDiscoveryOptions, fields, f"discovery {url}")
    return Path(urllib.parse.unquote(parts.path)), parsed, metrics
