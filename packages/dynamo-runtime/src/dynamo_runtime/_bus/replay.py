"""Asking a publisher for what its ring holds, or for its state."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import zmq

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, UnavailableError
from dynamo_core.events import EventEnvelope
from dynamo_runtime._bus.options import BusOptions
from dynamo_runtime._bus.sockets import SocketReader, send
from dynamo_runtime._bus.wire import PACKET_BYTES, ReplayPart, ReplayQuery, decode_part, encode
from dynamo_runtime._plane.timers import wait_within

if TYPE_CHECKING:
    from dynamo_core.ids import PublisherId


class Answer:
    """What a publisher answers, part by part.

    Args:
        query: The question.
        options: Limits; what an answer has beyond them is left out.
    """

    def __init__(self, query: ReplayQuery, options: BusOptions) -> None:
        self.complete = asyncio.Event()
        self._query = query
        self._events: list[EventEnvelope] = []
        self._known = True
        ring_bytes = max(options.ring_bytes, options.max_event_bytes)
        self._room_bytes = options.max_snapshot_bytes if query.snapshot else ring_bytes

    def take(self, message: bytes) -> None:
        """Take a part."""
        try:
            part = decode_part(message)
        except BackendProtocolError:
            # Whatever answers there is no publisher of this bus; NATS itself does if nobody listens.
            part = ReplayPart([], done=True, known=False)
        for event in part.events:
            self._room_bytes -= len(event.payload)
            if self._room_bytes < 0 or self.complete.is_set():
                self.complete.set()
                return
            self._events.append(event)
        self._known = self._known and part.known
        if part.done:
            self.complete.set()

    async def events(self, clock: Clock, timeout_s: float) -> list[EventEnvelope]:
        """Return all events once the last part is there.

        Raises:
            UnavailableError: if the publisher is gone or does not answer in time.
        """
        in_time = await wait_within(clock, timeout_s, self.complete.wait())
        if not in_time or not self._known:
            detail = "is gone" if in_time else f"did not answer within {timeout_s:g} s"
            raise UnavailableError(
                f"publisher {self._query.publisher_id:x} {detail}", reason="transport.cannot_connect"
            )
        return self._events


def state_of(publisher: PublisherId) -> ReplayQuery:
    """Return the question for a publisher's state."""
    return ReplayQuery(publisher, snapshot=True)


async def fetch(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    query: ReplayQuery,
    *,
    clock: Clock,
    options: BusOptions,
    timeout_s: float,
) -> list[EventEnvelope]:
    """Ask over a socket of its own; return what is still there of what was asked for. Cancelling drops the question.

    Raises:
        UnavailableError: if the publisher is gone or does not answer in time.
    """
    answer = Answer(query, options)
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, options.max_event_bytes + PACKET_BYTES)
    reader = SocketReader(socket, lambda frames: answer.take(frames[-1]))
    try:
        socket.connect(address)
        send(reader, [encode(query)])
        return await answer.events(clock, timeout_s)
    finally:
        reader.close()
