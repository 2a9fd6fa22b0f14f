"""One socket of the request plane, whichever side opened it: greeting, frames in, one write a tick, signs of life."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, DynamoError, UnavailableError, error_from_record
from dynamo_runtime._plane._metrics import PlaneMetrics
from dynamo_runtime._plane.framing import PREFACE, Fault, Frame, FrameReader, Hello, Ping, Pong, encode
from dynamo_runtime._plane.options import PlaneOptions
from dynamo_runtime._plane.timers import Timers

LEAVING = "backend.draining"
"""Reason of a fault that ends a connection in order; calls that are open then have not begun."""

logger = structlog.get_logger(__name__)

FRAME_OVERHEAD_BYTES = 1024
"""Room that a frame needs beside its payload or its one item."""


@dataclass
class PlaneState:
    """What all connections of one plane share."""

    clock: Clock
    options: PlaneOptions
    metrics: PlaneMetrics
    timers: Timers
    connections: set[Connection] = field(default_factory=set["Connection"])


class Connection(asyncio.Protocol):
    """A socket with its frames.

    All that is due within one tick of the event loop leaves in one write. While the peer does not read, nothing is
    written, and each role bounds what waits meanwhile.

    Args:
        state: What the plane's connections share.
    """

    def __init__(self, state: PlaneState) -> None:
        self.state = state
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.paused = False
        self.loss: DynamoError | None = None
        self.max_payload_bytes = state.options.max_frame_bytes - FRAME_OVERHEAD_BYTES
        self.greeted: asyncio.Future[None] = self.loop.create_future()
        self.gone: asyncio.Future[None] = self.loop.create_future()
        self._reader = FrameReader(state.options.max_frame_bytes)
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes | bytearray] = []
        self._scheduled = False
        self._pong_due = False
        self._writable: asyncio.Future[None] | None = None
        self._heard = False
        self._heard_at_s = state.clock.monotonic()
        self._pinged_at_s: float | None = None
        self._handlers: dict[type, Callable[..., None]] = {
            Hello: self._on_hello,
            Ping: self._on_ping,
            Pong: self._on_pong,
            Fault: self._on_fault,
            **self.role_handlers(),
        }

    # The asyncio.Protocol side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the peer."""
        self._transport = cast("asyncio.Transport", transport)
        self.state.connections.add(self)
        found = transport.get_extra_info("socket")
        if found is not None and found.family in (socket.AF_INET, socket.AF_INET6):
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.write(PREFACE + encode(Hello(self.state.options.max_frame_bytes)))

    def data_received(self, data: bytes) -> None:
        """Act on the frames that arrived."""
        self._heard = True
        try:
            for frame in self._reader.feed(data):
                self._handlers.get(type(frame), _misplaced)(frame)
                if self.closed:
                    return
        except BackendProtocolError as error:
            self.refuse(error)
        self.frames_done()

    def pause_writing(self) -> None:
        """The peer does not keep up with reading."""
        self.paused = True

    def resume_writing(self) -> None:
        """The peer reads again."""
        self.paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """End everything that ran over the connection."""
        if self.loss is None:
            detail = str(exc) if exc is not None else "closed by the peer"
            self.loss = UnavailableError(
                "The connection to the worker was lost.", reason="transport.disconnected", diagnostic=detail
            )
        self.closed = True
        self.state.connections.discard(self)
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        for waiter in (self.greeted, self.gone):
            if not waiter.done():
                waiter.set_result(None)
        self.on_lost(self.loss)

    # What roles use and provide.

    def role_handlers(self) -> dict[type, Callable[..., None]]:
        """Return the frames this role takes, by type."""
        return {}

    def frames_done(self) -> None:
        """All frames of one read have been handled."""

    def on_lost(self, error: DynamoError) -> None:
        """The connection is gone for the given reason."""

    def collect(self, out: list[bytes | bytearray]) -> None:
        """Add the role's frames of this tick to ``out``."""

    def put(self, frame: Frame) -> None:
        """Queue a frame for this tick's write."""
        self._out.append(encode(frame))
        self.schedule()

    def put_encoded(self, frame: bytes | bytearray) -> None:
        """Queue an encoded frame for this tick's write."""
        self._out.append(frame)
        self.schedule()

    def schedule(self) -> None:
        """Write at the end of this tick."""
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what is due, unless the peer does not read; then ``resume_writing`` does."""
        self._scheduled = False
        if self.paused or self.closed or self._transport is None:
            return
        out, self._out = self._out, []
        if self._pong_due:
            self._pong_due = False
            out.append(encode(Pong()))
        self.collect(out)
        if out:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    async def wait_writable(self) -> None:
        """Return once the peer reads or the connection is gone."""
        while self.paused and not self.closed:
            if self._writable is None or self._writable.done():
                self._writable = self.loop.create_future()
            await asyncio.shield(self._writable)

    def refuse(self, error: DynamoError, kind: str = "malformed") -> None:
        """Tell the peer why, and close."""
        self.state.metrics.fault(kind)
        logger.warning("request_plane.connection_refused", kind=kind, error=error.message)
        self.put(Fault(error.to_record()))
        self.shut(
            UnavailableError(
                "The connection to the worker was lost.", reason="transport.disconnected", diagnostic=error.message
            )
        )

    def shut(self, error: DynamoError) -> None:
        """Write what is due, then close the connection for the given reason. Idempotent."""
        if self.closed:
            return
        self.loss = self.loss or error
        self.flush()
        self.closed = True
        if self._transport is not None:
            self._transport.close()
            if self._transport.get_write_buffer_size():
                # A peer that does not read would keep the closing transport for ever.
                self.state.timers.after(self.state.options.connect_timeout_s, self._transport.abort)

    def leave(self, error: DynamoError) -> None:
        """Close, once no call runs here: what the peer has sent since has begun nothing and can be sent elsewhere."""
        # The ends of calls go first, so that whatever is open at the peer when it hears this was never looked at.
        self.flush()
        if not self.paused and not self.closed:
            self.put(Fault(UnavailableError("The worker leaves.", reason=LEAVING).to_record()))
        self.shut(error)

    def abort(self, error: DynamoError) -> None:
        """Drop the connection at once for the given reason."""
        self.loss = self.loss or error
        if self._transport is not None:
            self._transport.abort()

    def check_alive(self, now_s: float, *, fresh_start: bool) -> None:
        """Ask a silent peer for a sign of life, and drop it if it gave none in time.

        Args:
            now_s: Monotonic time.
            fresh_start: True if this process itself stood still, so that silence proves nothing.
        """
        if self._heard or fresh_start:
            self._heard, self._heard_at_s, self._pinged_at_s = False, now_s, None
            return
        options = self.state.options
        if self._pinged_at_s is None:
            if now_s - self._heard_at_s >= options.keepalive_interval_s:
                self._pinged_at_s = now_s
                self.put(Ping())
        elif now_s - self._pinged_at_s >= options.keepalive_timeout_s:
            self.state.metrics.fault("keepalive")
            silent_s = now_s - self._heard_at_s
            self.abort(
                UnavailableError(
                    "The worker does not answer.",
                    reason="transport.disconnected",
                    diagnostic=f"silent for {silent_s:.1f} s, no answer to a ping",
                )
            )

    # Frames both roles take.

    def _on_hello(self, frame: Hello) -> None:
        limit = min(frame.max_frame_bytes, self.state.options.max_frame_bytes)
        if limit <= FRAME_OVERHEAD_BYTES:
            raise BackendProtocolError(f"peer takes frames of {frame.max_frame_bytes} bytes only; raise its limit")
        self.max_payload_bytes = limit - FRAME_OVERHEAD_BYTES
        if not self.greeted.done():
            self.greeted.set_result(None)

    def _on_ping(self, frame: Ping) -> None:
        del frame
        self._pong_due = True
        self.schedule()

    def _on_pong(self, frame: Pong) -> None:
        del frame

    def _on_fault(self, frame: Fault) -> None:
        cause = error_from_record(frame.error)
        reason = LEAVING if cause.reason == LEAVING else "transport.disconnected"
        error = UnavailableError("The worker closed the connection.", reason=reason, diagnostic=cause.message)
        error.__cause__ = cause
        self.shut(error)


def _misplaced(frame: Frame) -> None:
    raise BackendProtocolError(f"{type(frame).__name__} frame is not for this side of a connection")
