"""The connection: parses requests, keeps their order, writes each tick's output at once, enforces the limits."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, cast

import httptools

from dynamo_frontend._http.limits import HttpLimits
from dynamo_frontend._http.request import HttpRequest, split_target
from dynamo_frontend._http.response import HttpResponse

_COMMON = ("host", "accept", "authorization", "connection", "content-length", "content-type", "user-agent")
_KNOWN_NAMES = {spelling.encode(): name for name in _COMMON for spelling in (name, name.title())}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Application(Protocol):
    """What answers requests."""

    def handle(self, request: HttpRequest, response: HttpResponse) -> Coroutine[Any, Any, None] | None:
        """Answer at once, or return a coroutine that does; it is cancelled if the client leaves."""
        ...

    def refuse(self, status: int, message: str, response: HttpResponse) -> None:
        """Answer a request that broke the protocol or a limit; the connection closes after it."""
        ...


class ServerState(Protocol):
    """What connections share."""

    @property
    def limits(self) -> HttpLimits:
        """Bounds of each connection."""
        ...

    @property
    def closing(self) -> bool:
        """Whether the server takes no further requests on open connections."""
        ...

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def connection_opened(self, connection: HttpProtocol) -> None:
        """A client connected."""
        ...

    def connection_closed(self, connection: HttpProtocol, *, mid_response: bool) -> None:
        """A client is gone."""
        ...


class HttpProtocol(asyncio.Protocol):
    """One client connection.

    Requests are answered in order; one is in work at a time, the next ones wait in a bounded queue. The application is
    called without a task if it answers at once.
    """

    def __init__(self, app: Application, server: ServerState, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._server = server
        self._limits = server.limits
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[tuple[HttpRequest, HttpResponse]] = deque()
        self._active: HttpResponse | None = None
        self._task: asyncio.Task[None] | None = None
        self._reset_message()
        self._broken: tuple[int, str] | None = None
        self._out: list[bytes] = []
        self._body_out: list[bytes] = []
        self._flush_due = False
        self._reading_paused = False
        self._deadline: float | None = None
        self._wrote = False
        self._quiet_since = server.now()
        self.paused = False
        self.closed = False

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the socket up and start the idle time."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # A first token must never wait for the acknowledgement of the response's head.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._expect_within(self._limits.idle_timeout_s)
        self._server.connection_opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel what works for this client."""
        self.closed = True
        mid_response = self._active is not None
        active, self._active = self._active, None
        self._queue.clear()
        if active is not None:
            active.notify_disconnect()
        if self._task is not None:
            self._task.cancel()
        self._server.connection_closed(self, mid_response=mid_response)

    def eof_received(self) -> bool:
        """A client that closes its sending side is taken to have left."""
        return False

    def pause_writing(self) -> None:
        """Tell the producer to stop; the client must catch up within the write limit."""
        self.paused = True
        self._expect_within(self._limits.write_timeout_s)

    def resume_writing(self) -> None:
        """Tell the producer to go on."""
        self.paused = False
        self._deadline = None
        if self._active is not None:
            self._active.notify_drain()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a violation ends the connection with an answer in the API's form."""
        if self._broken is not None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._close_after_last()
        except httptools.HttpParserCallbackError as error:
            if self._broken is None:
                raise error.__context__ or error from None
        except httptools.HttpParserError as error:
            self._break(400, f"The request is not valid HTTP/1.1: {error}")
        if self._broken is not None:
            self._answer_broken()
        elif self._active is None and not self._queue and self._in_message:
            if self._head_done:
                self._expect_within(self._limits.body_timeout_s)
            elif self._head_due:
                self._head_due = False
                self._expect_within(self._limits.head_timeout_s)

    # --- httptools callbacks

    def on_message_begin(self) -> None:
        """Begin a message; its head gets a time limit if it does not come whole."""
        self._reset_message()
        self._in_message = True
        self._head_due = self._active is None

    def on_url(self, url: bytes) -> None:
        """Collect the target."""
        self._target += url
        if len(self._target) > self._limits.target_bytes:
            self._violate(414, f"The request target is longer than {self._limits.target_bytes} bytes; shorten it.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect one header."""
        self._header_bytes += len(name) + len(value)
        self._header_count += 1
        if self._header_bytes > self._limits.header_bytes or self._header_count > self._limits.header_count:
            self._violate(
                431,
                f"The headers exceed {self._limits.header_bytes} bytes or {self._limits.header_count} lines; "
                "send fewer or shorter ones.",
            )
        key = _KNOWN_NAMES.get(name) or name.decode("latin-1").lower()
        text = value.decode("latin-1")
        if key in self._headers:
            text = f"{self._headers[key]}, {text}"
        self._headers[key] = text

    def on_headers_complete(self) -> None:
        """Check the declared length and answer ``Expect``."""
        self._head_done = True
        length = self._headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            self._violate_body()
        asked = "expect" in self._headers and self._headers["expect"].lower() == "100-continue"
        if asked and self._active is None and not self._queue:
            self.write(_CONTINUE)

    def on_body(self, body: bytes) -> None:
        """Collect a piece of the body."""
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            self._violate_body()
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Queue the request, or start on it."""
        self._in_message = False
        self._deadline = None
        path, query = self._split_target()
        method = self._parser.get_method().decode("ascii")
        version = self._parser.get_http_version()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        request = HttpRequest(method, path, query, self._headers, body, version)
        keep_alive = self._parser.should_keep_alive() and not self._server.closing
        response = HttpResponse(self, head_only=method == "HEAD", chunked=version == "1.1", keep_alive=keep_alive)
        self._body = []
        self._queue.append((request, response))
        if self._active is None:
            self._start_next()
        elif len(self._queue) >= self._limits.pipelined_requests:
            self._pause_reading()

    # --- used by responses

    def write(self, data: bytes) -> None:
        """Queue bytes for this tick's write."""
        if not self.closed:
            self._frame_body()
            self._out.append(data)
            self._schedule_flush()

    def write_body(self, data: bytes, *, chunked: bool) -> None:
        """Queue a piece of a streamed body."""
        if not self.closed:
            (self._body_out if chunked else self._out).append(data)
            self._schedule_flush()

    def write_last_chunk(self) -> None:
        """Queue the end of a chunked body."""
        self.write(b"0\r\n\r\n")

    def response_done(self, response: HttpResponse) -> None:
        """Go on with the next request, or close."""
        if response is not self._active:
            return
        self._active = None
        self._task = None
        if response.close_after or self._server.closing:
            self.close()
            return
        if self._queue:
            # From the loop: a client that pipelines many cheap requests must not deepen the stack with each.
            self._loop.call_soon(self._start_next)
        elif self._broken is None:
            self._expect_within(self._limits.idle_timeout_s)

    def abort(self) -> None:
        """Drop the connection without finishing what is queued for it."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Send what is queued, then close."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def close_when_idle(self) -> None:
        """Close now if nothing is in work, else after the present response."""
        if self._active is not None:
            self._active.close_after = True
        elif not self._queue:
            self.close()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered or waits."""
        return self._active is not None or bool(self._queue)

    def check_time(self, now: float) -> None:
        """Enforce the time limit that applies at this moment."""
        self._check_quiet(now)
        if self._deadline is None or now < self._deadline or self.closed:
            return
        self._deadline = None
        if self.paused:
            self.abort()
        elif self._in_message and self._active is None:
            self._break(408, "The request did not arrive in time; send it without long pauses.")
            self._answer_broken()
        elif self._active is None:
            self.close()

    def _check_quiet(self, now: float) -> None:
        # Writes only leave a mark; the clock is looked at here, once a second, and not for every event.
        active = self._active
        if self._wrote or active is None:
            self._wrote = False
            self._quiet_since = now
        elif active.quiet_limit_s is not None and now - self._quiet_since >= active.quiet_limit_s:
            self._quiet_since = now
            active.notify_quiet()

    def flush(self) -> None:
        """Write everything that is queued, in one call."""
        self._flush_due = False
        self._wrote = True
        self._frame_body()
        if self._out and self._transport is not None and not self.closed:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            self._transport.write(data)

    # --- internals

    def _reset_message(self) -> None:
        self._target = bytearray()
        self._headers: dict[str, str] = {}
        self._header_bytes = 0
        self._header_count = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._in_message = False
        self._head_done = False
        self._head_due = False

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def _frame_body(self) -> None:
        if self._body_out:
            data = self._body_out[0] if len(self._body_out) == 1 else b"".join(self._body_out)
            self._body_out.clear()
            self._out.append(b"%x\r\n%b\r\n" % (len(data), data))

    def _start_next(self) -> None:
        if self.closed or self._active is not None or not self._queue:
            return
        request, response = self._queue.popleft()
        self._active = response
        self._deadline = None
        if self._reading_paused and len(self._queue) < self._limits.pipelined_requests:
            self._resume_reading()
        work = self._app.handle(request, response)
        if work is not None:
            self._task = self._loop.create_task(work)

    def _expect_within(self, seconds: float) -> None:
        self._deadline = self._server.now() + seconds

    def _split_target(self) -> tuple[str, str]:
        try:
            return split_target(bytes(self._target))
        except ValueError:
            self._break(400, "The request target is not a valid URL path.")
            raise

    def _violate(self, status: int, message: str) -> None:
        """Leave the parser with a violation noted."""
        self._break(status, message)
        raise ValueError(message)

    def _violate_body(self) -> None:
        self._violate(413, f"The request body is larger than {self._limits.body_bytes} bytes; send a smaller one.")

    def _break(self, status: int, message: str) -> None:
        self._broken = (status, message)
        self._reset_message()

    def _answer_broken(self) -> None:
        """Answer the violation after the requests before it."""
        assert self._broken is not None
        status, message = self._broken
        response = HttpResponse(self, head_only=False, chunked=True, keep_alive=False)
        if self._active is not None or self._queue:
            # Earlier requests are answered first; this one only closes the connection after them.
            self._close_after_last()
            return
        self._active = response
        self._app.refuse(status, message, response)

    def _close_after_last(self) -> None:
        if self._queue:
            self._queue[-1][1].close_after = True
        elif self._active is not None:
            self._active.close_after = True
        else:
            self.close()

    def _pause_reading(self) -> None:
        if self._transport is not None and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()


ProtocolFactory = Callable[[], HttpProtocol]
