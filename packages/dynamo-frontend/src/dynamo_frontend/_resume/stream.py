"""A streamed response that numbers its events, keeps them, and may change its connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dynamo_frontend._http.response import Headers, HttpResponse
from dynamo_frontend._resume.ring import EventRing


class StreamKeeper(Protocol):
    """Who is told of a stream's life."""

    def opened(self, stream: ResumableResponse) -> None:
        """Events begin to flow: the stream can be resumed from now on."""
        ...

    def grown(self, stream: ResumableResponse, size_bytes: int) -> None:
        """The stream's memory changed by so much."""
        ...

    def left(self, stream: ResumableResponse) -> None:
        """Nobody reads it any more: its client is gone, or it has ended."""
        ...

    def dropped(self, stream: ResumableResponse) -> None:
        """It broke and cannot be resumed."""
        ...


class ResumableResponse(HttpResponse):
    """What a handler writes to, whichever connection it reaches at the moment.

    Before the first event it is no more than its connection's response. From then on a lost connection is not a
    disconnect to the handler: events are kept until a client comes back for them, or the keeper gives it up.

    Args:
        response: Response of the first connection.
        keeper: Told of its life.
        token: Unguessable name, the first part of every event's id.
        capacity_bytes: Most bytes of events kept. Half of it is for what a lost connection may have swallowed, half
            for what comes while no client is there; then the generation waits.
        origin: What a client that comes back must have in common with the first.
    """

    __slots__ = (
        "_attached",
        "_away_bytes",
        "_capacity",
        "_head",
        "_keeper",
        "_prefix",
        "given_up",
        "origin",
        "ring",
        "token",
    )

    def __init__(
        self,
        response: HttpResponse,
        keeper: StreamKeeper,
        token: str,
        capacity_bytes: int,
        origin: tuple[str, ...] = (),
    ) -> None:
        super().__init__(_NoConnection(), head_only=False, chunked=False, keep_alive=True)
        self.token = token
        self.origin = origin
        self.ring = EventRing(capacity_bytes)
        self.given_up = False
        self._capacity = capacity_bytes
        self._prefix = f"id: {token}.".encode()
        self._keeper = keeper
        self._head: tuple[int, str, Headers] | None = None
        self._attached: HttpResponse | None = None
        self._away_bytes = 0
        self._attach(response)

    @property
    def disconnected(self) -> bool:
        """Whether no client will read on."""
        return self.given_up or (self._attached is not None and self._attached.disconnected)

    @property
    def writable(self) -> bool:
        """Whether the client keeps up; without one, whether there is room to keep more."""
        if self._attached is not None:
            return self._attached.writable
        return self._away_bytes < self._capacity // 2

    @property
    def away(self) -> bool:
        """Whether it runs with no client."""
        return self._attached is None and not self.ended

    def on_quiet(self, limit_s: float, callback: Callable[[], None]) -> None:
        """Call back each time nothing was written for so long."""
        super().on_quiet(limit_s, callback)
        if self._attached is not None:
            self._attached.on_quiet(limit_s, callback)

    def send(self, status: int, body: bytes, content_type: str, headers: Headers | None = None) -> None:
        """Send a whole response; there is nothing to resume in it."""
        self.started = True
        attached = self._finished()
        if attached is not None:
            attached.send(status, body, content_type, headers)

    def start(self, status: int, content_type: str, headers: Headers | None = None) -> None:
        """Begin the stream."""
        self.started = True
        self._head = (status, content_type, headers or {})
        if self._attached is not None:
            self._attached.start(*self._head)
        self._keeper.opened(self)

    def write(self, data: bytes) -> None:
        """Number, keep and send events; ``data`` holds whole ones. A comment is sent, and not kept."""
        if self.ended:
            return
        before = self.ring.size_bytes
        out = b"".join([self._numbered(event) for event in data.split(b"\n\n") if event])
        if self._attached is not None:
            self._attached.write(out)
        else:
            self._away_bytes += len(out)
        self._keeper.grown(self, self.ring.size_bytes - before)

    def end(self) -> None:
        """End the stream; its events stay for a while."""
        if self.ended:
            return
        attached = self._finished()
        if attached is not None:
            attached.end()
        self._keeper.left(self)

    def abort(self) -> None:
        """Drop the connection and the stream."""
        attached = self._finished()
        if attached is not None:
            attached.abort()
        self._keeper.dropped(self)

    def resume(self, number: int, response: HttpResponse) -> bool:
        """Go on with another connection behind an event; return False if what follows it is not kept."""
        missing = self.ring.after(number)
        if missing is None or self._head is None:
            return False
        old, self._attached = self._attached, None
        if old is not None:
            # The client has noticed the loss before this side did.
            old.abort()
        response.start(*self._head)
        if missing:
            response.write(b"".join(missing))
        if self.ended:
            response.end()
            self._keeper.left(self)
            return True
        self._away_bytes = 0
        self._attach(response)
        self.notify_drain()
        return True

    def give_up(self) -> None:
        """No client will come: the handler hears of a disconnect. Idempotent."""
        self.given_up = True
        self.notify_disconnect()

    def _finished(self) -> HttpResponse | None:
        """Let go of the handler, whose reply must not wait as long as its events do; return the connection's part."""
        self.ended = True
        self._on_disconnect = self._on_drain = self._on_quiet = None
        attached, self._attached = self._attached, None
        return attached

    def _attach(self, response: HttpResponse) -> None:
        self._attached = response
        response.on_drain(self.notify_drain)
        if self.quiet_limit_s is not None:
            response.on_quiet(self.quiet_limit_s, self.notify_quiet)
        response.on_disconnect(lambda: self._lost(response))

    def _lost(self, response: HttpResponse) -> None:
        if response is not self._attached:
            return
        self._attached = None
        if self.started:
            self._keeper.left(self)
            # Bytes held back for the slow client that left may flow into the ring now.
            self.notify_drain()
        else:
            self.give_up()

    def _numbered(self, event: bytes) -> bytes:
        if event.startswith(b":"):
            return event + b"\n\n"
        numbered = b"%b%d\n%b\n\n" % (self._prefix, self.ring.last + 1, event)
        self.ring.add(numbered)
        return numbered


class _NoConnection:
    """Connection of a response that writes through others."""

    closed = False
    paused = False

    def write(self, data: bytes) -> None:
        """Never called."""

    def write_body(self, data: bytes, *, chunked: bool) -> None:
        """Never called."""

    def write_last_chunk(self) -> None:
        """Never called."""

    def response_done(self, response: HttpResponse) -> None:
        """Never called."""

    def abort(self) -> None:
        """Never called."""
