"""The calling side: a connection this process opened, and the calls on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from dynamo_core.errors import (
    BackendProtocolError,
    CancelledRequestError,
    DeadlineExceededError,
    DynamoError,
    InternalError,
    PayloadTooLargeError,
    error_from_record,
)
from dynamo_core.planes import Call, CallOptions, StreamReceiver
from dynamo_runtime._plane.connection import FRAME_OVERHEAD_BYTES, Connection, PlaneState
from dynamo_runtime._plane.framing import Batch, Cancel, Grant, Open, encode
from dynamo_runtime._plane.timers import Timer

logger = structlog.get_logger(__name__)


class ClientCall:
    """A running call.

    Grants are held back while the server still has more than half of the first credit, so that a reader that grants
    item by item causes one frame for many items. They are never held back when the server could be waiting.

    Args:
        connection: What carries it; None for a call that never left.
        call_id: Its number there.
        receiver: Where its items go.
        credit: Items the server may send unasked.
    """

    __slots__ = (
        "_connection",
        "_floor",
        "_held",
        "_hold_above",
        "_outstanding",
        "ended",
        "id",
        "inbox",
        "receiver",
        "timer",
    )

    def __init__(
        self, connection: ClientConnection | None, call_id: int, receiver: StreamReceiver, credit: int
    ) -> None:
        self.id = call_id
        self.receiver = receiver
        self.inbox: list[bytes] | None = None
        self.ended = False
        self.timer: Timer | None = None
        self._connection = connection
        self._outstanding = credit
        self._hold_above = credit // 2
        self._floor = -connection.state.options.max_buffer_items if connection is not None else 0
        self._held = 0

    def grant(self, items: int) -> None:
        """Allow that many more items."""
        if items > 0 and not self.ended:
            self._held += items
            if self._outstanding <= self._hold_above:
                self._release()

    def cancel(self, *, kill: bool = False) -> None:
        """Ask the server to stop, or with ``kill`` drop the call at once. Idempotent."""
        if self.ended or self._connection is None:
            return
        self._connection.put(Cancel(self.id, kill))
        if kill:
            self._connection.forget(self)
            self.end(CancelledRequestError("The call was cancelled."))

    def expire(self) -> None:
        """The deadline passed."""
        if self.ended:
            return
        if self._connection is not None:
            self._connection.put(Cancel(self.id, kill=False))
            self._connection.forget(self)
        self.end(DeadlineExceededError("The worker did not finish within the deadline."))

    def arrived(self, count: int) -> bool:
        """Count items against the credit; return whether the server kept to it, but for the debt of an ended call."""
        self._outstanding -= count
        if self._held and self._outstanding <= self._hold_above:
            self._release()
        return self._outstanding >= self._floor

    def deliver(self) -> None:
        """Hand over what arrived."""
        items, self.inbox = self.inbox, None
        if items is None or self.ended:
            return
        try:
            self.receiver.on_items(items)
        except Exception as error:
            logger.exception("request_plane.receiver_failed")
            self._fail(error)

    def end(self, error: DynamoError | None) -> None:
        """Tell the receiver that the call is over. Idempotent."""
        if self.ended:
            return
        self.ended = True
        if self.timer is not None:
            self.timer.cancel()
        try:
            self.receiver.on_end(error)
        except Exception:
            logger.exception("request_plane.receiver_failed")

    def _fail(self, cause: Exception) -> None:
        if self._connection is not None and not self.ended:
            self._connection.put(Cancel(self.id, kill=True))
            self._connection.forget(self)
        error = InternalError("The receiver failed.", diagnostic=f"{type(cause).__name__}: {cause}")
        error.__cause__ = cause
        self.end(error)

    def _release(self) -> None:
        if self._connection is not None:
            held, self._held = self._held, 0
            self._outstanding += held
            self._connection.grant(self.id, held)


class ClientConnection(Connection):
    """A connection this process opened.

    Args:
        state: What the plane's connections share.
    """

    def __init__(self, state: PlaneState) -> None:
        super().__init__(state)
        self._calls: dict[int, ClientCall] = {}
        self._numbers = itertools.count(1)
        self._touched: list[ClientCall] = []
        self._grants: dict[int, int] = {}

    @property
    def calls(self) -> int:
        """Calls that run."""
        return len(self._calls)

    def role_handlers(self) -> dict[type, Callable[..., None]]:
        """Return the frames of servers."""
        return {Batch: self._on_batch}

    def open(
        self, endpoint: str, payload: bytes, receiver: StreamReceiver, options: CallOptions, deadline_s: float | None
    ) -> ClientCall:
        """Open a call.

        Raises:
            PayloadTooLargeError: if it does not fit a frame.
        """
        self.check_size(len(payload))
        number = next(self._numbers)
        frame = encode(
            Open(
                number,
                endpoint,
                payload,
                options.credit_items,
                options.request_id,
                deadline_s,
                options.headers,
                options.schema,
            )
        )
        self.check_size(len(frame) - FRAME_OVERHEAD_BYTES)
        call = ClientCall(self, number, receiver, options.credit_items)
        self._calls[number] = call
        if deadline_s is not None:
            call.timer = self.state.timers.after(deadline_s, call.expire)
        self.put_encoded(frame)
        return call

    def check_size(self, size: int) -> None:
        """Raise ``PayloadTooLargeError`` if the peer would not take a payload of that many bytes."""
        if size > self.max_payload_bytes:
            self.state.metrics.fault("too_large")
            raise PayloadTooLargeError(
                f"payload of {size} bytes exceeds the limit of {self.max_payload_bytes}; "
                "send less or raise max_frame_bytes on both sides"
            )

    def grant(self, call_id: int, items: int) -> None:
        """Send more credit with this tick's write."""
        self._grants[call_id] = self._grants.get(call_id, 0) + items
        self.schedule()

    def forget(self, call: ClientCall) -> None:
        """Drop whatever still comes for a call."""
        self._calls.pop(call.id, None)
        self._grants.pop(call.id, None)

    def collect(self, out: list[bytes | bytearray]) -> None:
        """Pack the tick's grants of all calls."""
        if self._grants:
            out.append(encode(Grant(list(self._grants), list(self._grants.values()))))
            self._grants.clear()

    def frames_done(self) -> None:
        """Hand over everything that one read brought, call by call."""
        if self._touched:
            touched, self._touched = self._touched, []
            for call in touched:
                call.deliver()

    def on_lost(self, error: DynamoError) -> None:
        """End all calls."""
        self.frames_done()
        calls, self._calls = self._calls, {}
        if calls and error.reason == "transport.disconnected":
            self.state.metrics.fault("disconnected")
        for call in calls.values():
            call.end(error)

    def _on_batch(self, frame: Batch) -> None:
        if len(frame.calls) != len(frame.items):
            raise BackendProtocolError("a batch must have items for each call")
        for call_id, items in zip(frame.calls, frame.items, strict=True):
            call = self._calls.get(call_id)
            if call is not None:
                self._take(call, items)
        for call_id in frame.ended:
            self._end(call_id, None)
        for call_id, record in frame.failed:
            self._end(call_id, error_from_record(record))

    def _take(self, call: ClientCall, items: list[bytes]) -> None:
        if not call.arrived(len(items)):
            self._overrun(call)
        elif call.inbox is None:
            call.inbox = items
            self._touched.append(call)
        else:
            call.inbox += items

    def _end(self, call_id: int, error: DynamoError | None) -> None:
        call = self._calls.pop(call_id, None)
        if call is not None:
            self._grants.pop(call_id, None)
            call.deliver()
            call.end(error)

    def _overrun(self, call: ClientCall) -> None:
        self.state.metrics.fault("overrun")
        self.put(Cancel(call.id, kill=True))
        self.forget(call)
        call.deliver()
        call.end(BackendProtocolError("The worker sent more items than it was granted.", reason="backend.protocol"))


def refused_call(receiver: StreamReceiver, error: DynamoError) -> ClientCall:
    """Return a call that ended before it left."""
    call = ClientCall(None, 0, receiver, 0)
    call.end(error)
    return call


if TYPE_CHECKING:
    _CALL: type[Call] = ClientCall
