"""Asking a publisher's ring."""

from __future__ import annotations

import asyncio

import zmq

from dynamo_core.clock import Clock
from dynamo_core.errors import BackendProtocolError, UnavailableError
from dynamo_core.events import EventEnvelope
from dynamo_runtime._bus.sockets import SocketReader, send
from dynamo_runtime._bus.wire import ReplayPart, ReplayQuery, decode_part, encode
from dynamo_runtime._plane.timers import wait_within


async def fetch(
    context: zmq.Context[zmq.Socket[bytes]], address: str, query: ReplayQuery, clock: Clock, timeout_s: float
) -> list[EventEnvelope]:
    """Return what a publisher's ring still holds of the events asked for. Cancelling drops the question.

    Raises:
        UnavailableError: if the publisher is gone or does not answer in time.
    """
    answer = _Answer()
    socket = context.socket(zmq.DEALER)
    reader = SocketReader(socket, answer.take)
    try:
        socket.connect(address)
        send(reader, [encode(query)])
        in_time = await wait_within(clock, timeout_s, answer.complete.wait())
    finally:
        reader.close()
    if not in_time or not answer.known:
        detail = "is gone" if in_time else f"did not answer within {timeout_s:g} s"
        raise UnavailableError(f"publisher {query.publisher_id:x} {detail}", reason="transport.cannot_connect")
    return answer.events


class _Answer:
    def __init__(self) -> None:
        self.events: list[EventEnvelope] = []
        self.known = True
        self.complete = asyncio.Event()

    def take(self, frames: list[bytes]) -> None:
        try:
            part = decode_part(frames[-1])
        except BackendProtocolError:
            # Whatever answers there is no publisher of this bus.
            part = ReplayPart([], done=True, known=False)
        self.events += part.events
        self.known = self.known and part.known
        if part.done:
            self.complete.set()
