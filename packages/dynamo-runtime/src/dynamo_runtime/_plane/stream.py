"""One call as its server sees it: the handler's context and sink in one object."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec
import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import (
    CancelledRequestError,
    CapacityExhaustedError,
    DynamoError,
    ErrorRecord,
    PayloadTooLargeError,
    as_dynamo_error,
)
from dynamo_core.planes import RequestContext, RequestHandler, ResponseSink
from dynamo_runtime._plane._metrics import PlaneMetrics
from dynamo_runtime._plane.framing import Open
from dynamo_runtime._plane.options import PlaneOptions
from dynamo_runtime._plane.timers import Timer, Timers

logger = structlog.get_logger(__name__)

MAX_MESSAGE_CHARS = 4096


class CarrierState(Protocol):
    """What a call needs of its plane."""

    @property
    def clock(self) -> Clock:
        """Time."""
        ...

    @property
    def options(self) -> PlaneOptions:
        """Limits."""
        ...

    @property
    def metrics(self) -> PlaneMetrics:
        """Counts of faults."""
        ...

    @property
    def timers(self) -> Timers:
        """Timers of deadlines."""
        ...


class CallCarrier(Protocol):
    """What brings a call's items to its caller: a connection, or a subject of a broker."""

    @property
    def state(self) -> CarrierState:
        """The plane's."""
        ...

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop everything runs on."""
        ...

    @property
    def max_payload_bytes(self) -> int:
        """Largest item."""
        ...

    def mark_ready(self, call: ServerCall) -> None:
        """The call has items that may leave."""
        ...

    def end(self, call: ServerCall, error: ErrorRecord | None) -> None:
        """The call is over."""
        ...


Turn = Callable[["ServerCall"], Awaitable[None]]
"""Returns when a call may run; raises why it may not."""


class CallOwner(Protocol):
    """Who counts a call: the endpoint it belongs to."""

    def released(self, call: ServerCall) -> None:
        """The call's handler is done and its end is on its way."""
        ...


class ServerCall:
    """A call being served.

    Items wait in ``_out`` until the connection takes them, at most ``_window`` of them before the caller grants more.
    A handler that sends on without credit goes into debt; the debt leaves when the caller grants or the handler ends.

    Args:
        connection: Where it came from.
        frame: How it was opened.
        owner: Who counts it.
    """

    __slots__ = (
        "_closed",
        "_connection",
        "_credit_waiter",
        "_deadline_at_s",
        "_end",
        "_headers",
        "_out",
        "_owner",
        "_request_id",
        "_stop_callbacks",
        "_stop_waiter",
        "_stopped",
        "_timer",
        "_window",
        "id",
        "task",
    )

    def __init__(self, connection: CallCarrier, frame: Open, owner: CallOwner) -> None:
        self.id = frame.call
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._owner = owner
        self._request_id = frame.request_id
        self._headers = frame.headers
        self._window = frame.credit
        self._out: list[bytes] = []
        self._end: tuple[DynamoError | None] | None = None
        self._closed = False
        self._stopped = False
        self._stop_callbacks: list[Callable[[], None]] = []
        self._stop_waiter: asyncio.Future[None] | None = None
        self._credit_waiter: asyncio.Future[None] | None = None
        self._deadline_at_s: float | None = None
        self._timer: Timer | None = None
        if frame.deadline_s is not None:
            self._deadline_at_s = connection.state.clock.monotonic() + frame.deadline_s
            self._timer = connection.state.timers.after(frame.deadline_s, self.stop)

    # The context.

    @property
    def request_id(self) -> str:
        """Request id of the caller."""
        return self._request_id

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the caller."""
        return self._headers

    @property
    def stopped(self) -> bool:
        """Whether the caller wants no more."""
        return self._stopped

    def remaining_s(self) -> float | None:
        """Seconds to the deadline; None without one."""
        if self._deadline_at_s is None:
            return None
        return max(0.0, self._deadline_at_s - self._connection.state.clock.monotonic())

    async def wait_stopped(self) -> None:
        """Return once the caller wants no more."""
        if self._stopped:
            return
        if self._stop_waiter is None:
            self._stop_waiter = self._connection.loop.create_future()
        await asyncio.shield(self._stop_waiter)

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Call back once when the caller wants no more; at once if it is so."""
        if self._stopped:
            callback()
        else:
            self._stop_callbacks.append(callback)

    # The sink.

    @property
    def credit(self) -> int:
        """Items that may still be sent before the receiver grants more."""
        return self._window - len(self._out)

    def send(self, item: bytes) -> None:
        """Queue an item for this tick's write; dropped once the call ended.

        Raises:
            PayloadTooLargeError: if the item does not fit a frame.
            CapacityExhaustedError: if more items wait for credit than the plane's limit.
        """
        if self._closed or self._end is not None:
            return
        connection = self._connection
        size = len(item)
        if size > connection.max_payload_bytes:
            connection.state.metrics.fault("too_large")
            raise PayloadTooLargeError(f"item of {size} bytes exceeds the limit of {connection.max_payload_bytes}")
        out = self._out
        if not out and self._window > 0:
            connection.mark_ready(self)
        out.append(item)
        if len(out) - self._window > connection.state.options.max_buffer_items:
            self._overrun()

    async def wait_credit(self) -> None:
        """Return once credit is positive or the call has stopped."""
        while self.credit <= 0 and not self._stopped and not self._closed:
            if self._credit_waiter is None:
                self._credit_waiter = self._connection.loop.create_future()
            await asyncio.shield(self._credit_waiter)

    # What the connection does.

    def begin(self, handler: RequestHandler, payload: bytes, turn: Turn | None = None) -> None:
        """Serve the call in a task, once ``turn`` has returned."""
        self.task = self._connection.loop.create_task(self._run(handler, payload, turn))
        # Not the task's own last act: one that is cancelled before it begins does nothing at all.
        self.task.add_done_callback(self._settled)

    async def _run(self, handler: RequestHandler, payload: bytes, turn: Turn | None) -> None:
        try:
            if turn is not None:
                await turn(self)
            await handler(payload, self, self)
        except asyncio.CancelledError:
            # Whoever cancelled from outside has ended the call already; this ends one whose handler cancelled itself.
            self.finish(CancelledRequestError("The handler was cancelled.", reason="backend.cancelled"))
        except Exception as error:
            if not isinstance(error, DynamoError):
                logger.exception("request_plane.handler_failed", request_id=self._request_id)
            self.finish(as_dynamo_error(error))
        else:
            self.finish(None)

    def _settled(self, task: asyncio.Task[None]) -> None:
        del task
        self.task = None
        if self._closed:
            self._owner.released(self)

    def take(self) -> list[bytes]:
        """Take the items that may leave now."""
        out = self._out
        count = len(out)
        if count <= self._window:
            self._out = []
        else:
            count = self._window
            self._out = out[count:]
            out = out[:count]
        self._window -= count
        if self._end is not None:
            self._try_end()
        return out

    def grant(self, items: int) -> None:
        """The caller takes that many more."""
        self._window += items
        if self._out and self._window > 0:
            self._connection.mark_ready(self)
        if self.credit > 0:
            self._wake_credit()

    def finish(self, error: DynamoError | None) -> None:
        """No more items come; the end leaves with those that wait.

        What the handler sent beyond the credit leaves too: it is bounded, and no end should wait for a slow reader.
        """
        if self._end is not None or self._closed:
            return
        self._end = (error,)
        if self._out and self._window <= 0:
            self._connection.mark_ready(self)
        self._window = max(self._window, len(self._out))
        self._try_end()

    def stop(self) -> None:
        """The caller wants no more. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        if self._stop_waiter is not None:
            self._stop_waiter.set_result(None)
        self._wake_credit()
        callbacks, self._stop_callbacks = self._stop_callbacks, []
        for callback in callbacks:
            _run_callback(callback)

    def drop(self, *, cancel: bool) -> None:
        """Forget the call without telling the caller; with ``cancel`` the handler too is cancelled."""
        if not self._closed:
            self._close()
            self.stop()
        if cancel and self.task is not None:
            self.task.cancel()

    def end_with(self, error: DynamoError) -> None:
        """End the call now with an error and cancel its handler."""
        if not self._closed:
            self._connection.end(self, bounded_record(error))
        self.drop(cancel=True)

    def _try_end(self) -> None:
        if self._closed or self._out or self._end is None:
            return
        error = self._end[0]
        self._connection.end(self, bounded_record(error) if error is not None else None)
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._out.clear()
        self._wake_credit()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.task is None:
            self._owner.released(self)

    def _overrun(self) -> None:
        self._connection.state.metrics.fault("overrun")
        error = CapacityExhaustedError(
            f"{len(self._out)} items wait for a receiver that grants no credit; the handler must await wait_credit",
            reason="capacity.slow_reader",
        )
        self._connection.end(self, bounded_record(error))
        self._close()
        self.stop()
        raise error

    def _wake_credit(self) -> None:
        waiter, self._credit_waiter = self._credit_waiter, None
        if waiter is not None:
            waiter.set_result(None)


def bounded_record(error: DynamoError) -> ErrorRecord:
    """Return an error's wire form with its messages cut, so that it fits any frame."""
    return _cut(error.to_record())


def _cut(record: ErrorRecord) -> ErrorRecord:
    causes = tuple(_cut(cause) for cause in record.causes)
    return msgspec.structs.replace(record, message=record.message[:MAX_MESSAGE_CHARS], causes=causes)


def _run_callback(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:
        logger.exception("request_plane.stop_callback_failed")


if TYPE_CHECKING:
    _CONTEXT: type[RequestContext] = ServerCall
    _SINK: type[ResponseSink] = ServerCall
