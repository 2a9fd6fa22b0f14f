"""One request's way out of the engine: checked, encoded and sent in the tick in which it came.

The normal path is synchronous from the engine's push to the plane's sink. Only a reader without credit costs more:
its output is held and merged up to a bound, and the handler's coroutine sends it as credit returns.
"""

from __future__ import annotations

import asyncio

from dynamo_core.clock import Clock
from dynamo_core.enums import FinishReason
from dynamo_core.errors import (
    BackendProtocolError,
    CapacityExhaustedError,
    DynamoError,
    InternalError,
    error_from_record,
)
from dynamo_core.planes import ResponseSink
from dynamo_core.requests import GenerateChunk
from dynamo_core.wire import GENERATE_CHUNK
from dynamo_worker._chunk_guard import ChunkGuard
from dynamo_worker._held_output import HeldOutput
from dynamo_worker._metrics import WorkerMetrics


class ResponseStream:
    """The ``ChunkSink`` of one request.

    Args:
        sink: Where encoded chunks go.
        guard: What chunks must satisfy.
        buffer_bytes: Most output held for a slow reader.
        clock: Time.
        metrics: Where counts go.

    Attributes:
        engine_done: Whether the engine has said its last word, so that no abort is needed.
        progress_at_s: When the engine last said something.
        first_output_at_s: When it first did; None before.
        stopped_at_s: When the caller gave up; None while it listens.
        deadline_at_s: When the request's own time is up; None without a limit.
    """

    def __init__(
        self, sink: ResponseSink, guard: ChunkGuard, *, buffer_bytes: int, clock: Clock, metrics: WorkerMetrics
    ) -> None:
        self.guard = guard
        self.engine_done = False
        self.started_at_s = clock.monotonic()
        self.progress_at_s = self.started_at_s
        self.first_output_at_s: float | None = None
        self.stopped_at_s: float | None = None
        self.deadline_at_s: float | None = None
        self._sink = sink
        self._buffer_bytes = buffer_bytes
        self._clock = clock
        self._metrics = metrics
        self._held = HeldOutput()
        self._ended = False
        self._error: DynamoError | None = None
        self._wake: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more is taken."""
        return self._ended

    @property
    def holding(self) -> bool:
        """Whether output waits for the reader."""
        return bool(self._held)

    def push(self, chunk: GenerateChunk) -> None:
        """Check a chunk and send or hold it. Never raises: a bad chunk ends this request only."""
        if self._ended:
            return
        self.progress_at_s = self._clock.monotonic()
        if self.first_output_at_s is None:
            self.first_output_at_s = self.progress_at_s
        try:
            self._take(chunk)
        except BackendProtocolError as error:
            self._metrics.protocol_errors.inc()
            self.end(error)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            # The engine yielded something that is no chunk, or a field that cannot be encoded.
            self._metrics.protocol_errors.inc()
            broken = BackendProtocolError(f"The engine broke its contract: {type(chunk).__name__} is no valid chunk.")
            broken.__cause__ = error
            self.end(broken)

    def fail(self, error: DynamoError) -> None:
        """Take the engine's own error; output before it still goes out."""
        self.engine_done = True
        self.end(error)

    def finish(self) -> None:
        """The engine's iterator ended: fine if every choice has, else a broken stream."""
        self.engine_done = True
        if not self._ended:
            self.end(self.guard.incomplete())

    def end(self, error: DynamoError | None, *, drop_held: bool = False) -> None:
        """End the stream for a reason of the host. The first end counts, unless its output is dropped unsent."""
        if self._ended and not (drop_held and self._held):
            return
        self._ended = True
        self._error = error
        if drop_held:
            self._held.clear()
        self._rouse()

    async def wait(self) -> None:
        """Send held output as credit allows, and return once everything has gone out.

        Raises:
            DynamoError: the error that ended the stream.
        """
        while self._held or not self._ended:
            self._wake = asyncio.get_running_loop().create_future()
            if self._held:
                await self._wait_credit(self._wake)
                self._send_held()
            else:
                await self._wake
        if self._error is not None:
            raise self._error

    def _take(self, chunk: GenerateChunk) -> None:
        if chunk.finish_reason is FinishReason.ERROR:
            self.fail(error_from_record(chunk.error) if chunk.error else unknown_engine_error(None))
            return
        chunk = self.guard.check(chunk)
        if self._held or self._sink.credit <= 0:
            self._hold(chunk)
        else:
            self._sink.send(GENERATE_CHUNK.encode(chunk))
        if self.guard.complete:
            self.engine_done = True
            self.end(None)

    def _hold(self, chunk: GenerateChunk) -> None:
        was_empty = not self._held
        self._held.add(chunk)
        self._metrics.held_chunks.inc()
        if self._held.size_bytes > self._buffer_bytes:
            slow = CapacityExhaustedError(
                f"The reader fell more than {self._buffer_bytes} bytes of output behind; "
                "read faster, or raise --response-buffer-bytes of the worker.",
                reason="capacity.reader_too_slow",
            )
            self.end(slow, drop_held=True)
        elif was_empty:
            self._rouse()

    async def _wait_credit(self, wake: asyncio.Future[None]) -> None:
        credit = asyncio.ensure_future(self._sink.wait_credit())
        try:
            await asyncio.wait({credit, wake}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            credit.cancel()

    def _send_held(self) -> None:
        while self._held and self._sink.credit > 0:
            self._sink.send(self._held.pop())
        if self.stopped_at_s is not None:
            self._held.clear()  # nobody reads it any more

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


def unknown_engine_error(error: object) -> InternalError:
    """Wrap whatever an engine raised that is not typed."""
    detail = f"{type(error).__name__}: {error}" if error is not None else "no error was given"
    wrapped = InternalError("The engine failed on this request.", reason="backend.unknown", diagnostic=detail)
    if isinstance(error, BaseException):
        wrapped.__cause__ = error
    return wrapped
