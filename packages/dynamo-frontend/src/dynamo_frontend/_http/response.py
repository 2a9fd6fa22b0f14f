"""One response: whole or streamed, with back-pressure and disconnects as callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Protocol

Headers = Mapping[str, str]
_STATUS_LINES: dict[int, bytes] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_STATUS_LINES[499] = b"HTTP/1.1 499 Client Closed Request\r\n"
_STATUS_LINES[529] = b"HTTP/1.1 529 Site Overloaded\r\n"
_BODILESS = frozenset({204, 304})


def status_line(status: int) -> bytes:
    """Return the first line of a response."""
    return _STATUS_LINES.get(status) or f"HTTP/1.1 {status} Status\r\n".encode()


def _head(status: int, headers: Headers) -> bytes:
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
        # A line break inside a value would split the response in two.
        lines = "".join([f"{name}: {' '.join(value.split())}\r\n" for name, value in headers.items()])
    return status_line(status) + lines.encode("latin-1", "replace")


class Connection(Protocol):
    """The connection that a response goes out on."""

    closed: bool
    paused: bool

    def write(self, data: bytes) -> None:
        """Queue bytes for this tick's write."""
        ...

    def write_body(self, data: bytes, *, chunked: bool) -> None:
        """Queue a piece of a streamed body."""
        ...

    def write_last_chunk(self) -> None:
        """Queue the end of a chunked body."""
        ...

    def response_done(self, response: HttpResponse) -> None:
        """The response is complete."""
        ...

    def abort(self) -> None:
        """Drop the connection."""
        ...


class HttpResponse:
    """The answer to one request. All methods are called on the event loop and never block.

    Exactly one of ``send`` or ``start`` … ``end`` is used. Writes after a disconnect are dropped.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_head_only",
        "_on_disconnect",
        "_on_drain",
        "_on_quiet",
        "close_after",
        "ended",
        "quiet_limit_s",
        "started",
    )

    def __init__(self, connection: Connection, *, head_only: bool, chunked: bool, keep_alive: bool) -> None:
        self._connection = connection
        self._head_only = head_only
        self._chunked = chunked
        self.close_after = not keep_alive
        self.started = False
        self.ended = False
        self._on_disconnect: Callable[[], None] | None = None
        self._on_drain: Callable[[], None] | None = None
        self._on_quiet: Callable[[], None] | None = None
        self.quiet_limit_s: float | None = None

    @property
    def disconnected(self) -> bool:
        """Whether the client is gone."""
        return self._connection.closed

    @property
    def writable(self) -> bool:
        """Whether the client keeps up; while False, a producer should stop."""
        return not self._connection.paused

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call back once if the client leaves before the response has ended (at once if it has left)."""
        if self.disconnected:
            callback()
        else:
            self._on_disconnect = callback

    def on_drain(self, callback: Callable[[], None]) -> None:
        """Call back each time the client has caught up."""
        self._on_drain = callback

    def on_quiet(self, limit_s: float, callback: Callable[[], None]) -> None:
        """Call back each time nothing was written for so long; checked once a second."""
        self.quiet_limit_s = limit_s
        self._on_quiet = callback

    def send(self, status: int, body: bytes, content_type: str, headers: Headers | None = None) -> None:
        """Send a whole response."""
        assert not self.started, "a response starts once"
        self.started = True
        head = _head(status, {"content-type": content_type, **(headers or {})} if body else headers or {})
        length = b"" if status in _BODILESS else b"content-length: %d\r\n" % len(body)
        payload = b"" if self._head_only or status in _BODILESS else body
        self._connection.write(head + length + self._connection_line() + payload)
        self._finish()

    def start(self, status: int, content_type: str, headers: Headers | None = None) -> None:
        """Begin a streamed response."""
        assert not self.started, "a response starts once"
        self.started = True
        if not self._chunked:
            self.close_after = True
        head = _head(status, {"content-type": content_type, "cache-control": "no-cache", **(headers or {})})
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        self._connection.write(head + framing + self._connection_line())

    def write(self, data: bytes) -> None:
        """Add to a streamed response; everything written in one tick leaves in one chunk."""
        if not self.ended and not self._head_only:
            self._connection.write_body(data, chunked=self._chunked)

    def end(self) -> None:
        """End a streamed response. Idempotent."""
        if self.ended:
            return
        if self._chunked and not self._head_only:
            self._connection.write_last_chunk()
        self._finish()

    def abort(self) -> None:
        """Drop the connection, so that the client sees a broken transfer instead of a complete one."""
        self._connection.abort()

    def notify_disconnect(self) -> None:
        """Tell the producer that the client left. Called by the protocol."""
        callback, self._on_disconnect = self._on_disconnect, None
        if callback is not None and not self.ended:
            self.ended = True
            callback()

    def notify_drain(self) -> None:
        """Tell the producer that it may go on. Called by the protocol."""
        if self._on_drain is not None and not self.ended:
            self._on_drain()

    def notify_quiet(self) -> None:
        """Tell the producer that nothing was written for its limit. Called by the protocol."""
        if self._on_quiet is not None and not self.ended:
            self._on_quiet()

    def _connection_line(self) -> bytes:
        return b"connection: close\r\n\r\n" if self.close_after else b"\r\n"

    def _finish(self) -> None:
        self.ended = True
        self._on_disconnect = None
        self._on_drain = None
        self._on_quiet = None
        self._connection.response_done(self)
