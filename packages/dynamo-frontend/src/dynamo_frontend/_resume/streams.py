"""The streams that can be resumed: opened, kept for a time without a client, bounded in memory."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dynamo_core.clock import Clock
from dynamo_core.errors import DynamoError, NotFoundError
from dynamo_frontend._http.request import HttpRequest
from dynamo_frontend._http.response import HttpResponse
from dynamo_frontend._metrics import ResumeMetrics
from dynamo_frontend._resume.stream import ResumableResponse
from dynamo_frontend._routes import Handler

RESUME_HEADER = "x-dynamo-stream-resume"
LAST_EVENT_HEADER = "last-event-id"
_EVENT_ID = re.compile(r"(?P<token>[A-Za-z0-9_-]{16})\.(?P<number>[0-9]{1,12})")
_STREAM_COST_BYTES = 1024
_ASKED = frozenset({"1", "true"})

Refuse = Callable[[DynamoError, HttpRequest, HttpResponse], None]
"""Answers an error in an API's own form."""


@dataclass(frozen=True, slots=True)
class ResumeLimits:
    """Bounds of what is kept.

    Attributes:
        always: Whether every stream can be resumed, and not only those that ask.
        grace_s: How long a stream waits for a client, and its events stay after its end.
        stream_bytes: Most bytes of one stream's events.
        total_bytes: Most bytes of all.
    """

    always: bool = False
    grace_s: float = 15.0
    stream_bytes: int = 1 << 20
    total_bytes: int = 64 << 20


class ResumableStreams:
    """Wraps handlers, so that their streams can be resumed.

    A client that wants to come back sends ``x-dynamo-stream-resume: true``. Its events carry ids; after a loss it sends
    the request again with the last id in ``Last-Event-ID`` and gets the events behind it, from the same generation.
    """

    def __init__(self, limits: ResumeLimits, clock: Clock, metrics: ResumeMetrics) -> None:
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._streams: dict[str, ResumableResponse] = {}
        self._due: dict[str, float] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._work: set[asyncio.Future[None]] = set()
        self._size_bytes = 0

    def resumable(self, handler: Handler, refuse: Refuse | None = None) -> Handler:
        """Return the handler with streams that can be resumed.

        Args:
            handler: Answers the request.
            refuse: Answers an error in the API's form; OpenAI's if omitted.
        """

        def handle(request: HttpRequest, response: HttpResponse) -> Awaitable[None] | None:
            last = request.header(LAST_EVENT_HEADER)
            if last:
                try:
                    self._resume(last, request, response)
                except DynamoError as error:
                    if refuse is None:
                        raise
                    refuse(error, request, response)
                return None
            if self._limits.always or request.header(RESUME_HEADER).lower() in _ASKED:
                return self._run(handler, request, response)
            return handler(request, response)

        return handle

    async def close(self) -> None:
        """Give all streams up. Idempotent."""
        for token in list(self._streams):
            self._forget(token)
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
            self._sweeper = None
        for work in list(self._work):
            work.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)

    # --- StreamKeeper

    def opened(self, stream: ResumableResponse) -> None:
        """Keep a stream from now on."""
        self._streams[stream.token] = stream
        self.grown(stream, _STREAM_COST_BYTES)

    def grown(self, stream: ResumableResponse, size_bytes: int) -> None:
        """Count memory, and make room if there is too much of it."""
        if stream.token not in self._streams:
            return
        self._size_bytes += size_bytes
        while self._size_bytes > self._limits.total_bytes and self._streams:
            self._forget(self._least_wanted())
        self._show()

    def left(self, stream: ResumableResponse) -> None:
        """Let the time run for a stream that nobody reads."""
        if stream.token not in self._streams:
            if stream.away:
                stream.give_up()
            return
        self._due.pop(stream.token, None)
        self._due[stream.token] = self._clock.monotonic() + self._limits.grace_s
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep(), name="resumable-streams")

    def dropped(self, stream: ResumableResponse) -> None:
        """Forget a stream that broke."""
        self._forget(stream.token)
        self._show()

    # --- internals

    async def _run(self, handler: Handler, request: HttpRequest, response: HttpResponse) -> None:
        # Ids are the key to the stream's text, so they come from the system's randomness and not from a seed.
        token = secrets.token_urlsafe(12)
        stream = ResumableResponse(response, self, token, self._limits.stream_bytes, _origin(request))
        work = handler(request, stream)
        if work is None:
            return
        # A task of its own: the connection's is cancelled with the connection, a running stream is not.
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if token not in self._streams:
                task.cancel()
            else:
                task.add_done_callback(lambda done: self._ended_alone(stream, done))
            raise

    def _ended_alone(self, stream: ResumableResponse, work: asyncio.Future[None]) -> None:
        """End a stream whose handler failed when nobody waited for it."""
        if work.cancelled() or work.exception() is not None:
            stream.abort()

    def _resume(self, last: str, request: HttpRequest, response: HttpResponse) -> None:
        match = _EVENT_ID.fullmatch(last)
        token = match["token"] if match else ""
        stream = self._streams.get(token)
        if match is None or stream is None or stream.origin != _origin(request):
            raise self._gone()
        due = self._due.pop(token, None)
        if not stream.resume(int(match["number"]), response):
            if due is not None:
                self._due[token] = due
            raise self._gone()
        self._metrics.resumes.labels(outcome="resumed").inc()

    def _gone(self) -> DynamoError:
        self._metrics.resumes.labels(outcome="expired").inc()
        return NotFoundError(
            "The stream behind this Last-Event-ID is not kept here: its time is over, another key began it, or another "
            "process of this address holds it. Send the request again without the header.",
            reason="stream.expired",
            param="Last-Event-ID",
        )

    async def _sweep(self) -> None:
        while self._due:
            token, due = min(self._due.items(), key=lambda item: item[1])
            wait_s = due - self._clock.monotonic()
            if wait_s > 0:
                await self._clock.sleep(wait_s)
                continue
            self._forget(token)
            self._show()

    def _least_wanted(self) -> str:
        """Return the stream to forget first: one that has ended, else the oldest."""
        ended = next((token for token, stream in self._streams.items() if stream.ended), None)
        return ended or next(iter(self._streams))

    def _forget(self, token: str) -> None:
        stream = self._streams.pop(token, None)
        self._due.pop(token, None)
        if stream is None:
            return
        self._size_bytes -= _STREAM_COST_BYTES + stream.ring.size_bytes
        if stream.away:
            self._metrics.abandoned.inc()
            stream.give_up()

    def _show(self) -> None:
        self._metrics.streams.set(len(self._streams))
        self._metrics.size_bytes.set(self._size_bytes)


def _origin(request: HttpRequest) -> tuple[str, ...]:
    """Return what a client that comes back must have in common with the one that left.

    Where keys are asked for, that is the key itself: the text of a stream is not its tenant's to read.
    """
    if request.caller is not None:
        return (request.path, request.caller.key_id)
    return (request.path, *(request.header(name) for name in ("authorization", "x-api-key", "x-tenant-id")))
