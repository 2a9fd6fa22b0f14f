"""A request as the protocol hands it to the application."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field
from typing import Protocol


class CallerLimits(Protocol):
    """Who sent a request, as far as limits go."""

    @property
    def key_id(self) -> str:
        """Public name of the key that it came with."""
        ...

    @property
    def counts_tokens(self) -> bool:
        """Whether its tokens are limited."""
        ...

    def reserve(self, tokens: int) -> None:
        """Set tokens aside, or raise ``RateLimitedError``."""
        ...

    def settle(self, reserved: int, used: int) -> None:
        """Replace reserved tokens by those that were used."""
        ...

    def headers(self) -> dict[str, str]:
        """Return the headers that show the limits."""
        ...


@dataclass(slots=True)
class HttpRequest:
    """One request with its whole body.

    Attributes:
        method: In capitals.
        path: Percent-decoded path without the query.
        query: Raw query string.
        headers: Lower-case names; repeated headers are joined by ``", "``.
        body: Whole body, chunked encoding removed.
        http_version: ``1.0`` or ``1.1``.
        caller: Whose it is; None if callers are not told apart.
    """

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""
    http_version: str = "1.1"
    caller: CallerLimits | None = None

    def header(self, name: str) -> str:
        """Return a header by its lower-case name, or an empty string."""
        return self.headers.get(name, "")


def split_target(target: bytes) -> tuple[str, str]:
    """Return the decoded path and the raw query of a request target, absolute form included.

    Raises:
        ValueError: if the target is no valid URL path.
    """
    text = target.decode("ascii")
    if not text.startswith("/") and "://" in text:
        parts = urllib.parse.urlsplit(text)
        text = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    path, _, query = text.partition("?")
    if "%" in path:
        path = urllib.parse.unquote(path, errors="strict")
    return path, query
