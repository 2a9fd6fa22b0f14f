"""The async-iterator view of a call, for callers that do not need the push form."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from dynamo_core.errors import BackendProtocolError, DynamoError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import DEFAULT_CALL_OPTIONS, Call, CallOptions, RequestPlane


class StreamBuffer:
    """A receiver that buffers items for one reader and grants credit as they are read.

    What a server sends within its credit bounds the buffer. Leaving ``async with`` before the end kills the call.
    """

    def __init__(self) -> None:
        self._items: deque[bytes] = deque()
        self._ended = False
        self._error: DynamoError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._call: Call | None = None
        self._owed = 0

    def attach(self, call: Call) -> None:
        """Name the call to grant credit to; items may have come before it was known."""
        self._call = call
        self._grant(0)

    def on_items(self, items: Sequence[bytes]) -> None:
        """Buffer items and wake the reader."""
        self._items.extend(items)
        self._wake()

    def on_end(self, error: DynamoError | None) -> None:
        """Note the end and wake the reader."""
        self._ended = True
        self._error = error
        self._wake()

    async def receive(self) -> list[bytes]:
        """Return all items that are ready, waiting for at least one; an empty list is the clean end.

        Cancelling the wait loses nothing.

        Raises:
            DynamoError: the error that ended the call, after its last item.
        """
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items = list(self._items)
        self._items.clear()
        self._grant(len(items))
        return items

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over items one by one."""
        while items := await self.receive():
            for item in items:
                yield item

    def cancel(self, *, kill: bool = False) -> None:
        """Cancel the call; see ``Call.cancel``."""
        if self._call is not None and not self._ended:
            self._call.cancel(kill=kill)

    async def __aenter__(self) -> StreamBuffer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel(kill=True)

    def _grant(self, items: int) -> None:
        self._owed += items
        if self._call is not None and self._owed and not self._ended:
            self._call.grant(self._owed)
            self._owed = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def open_stream(
    plane: RequestPlane,
    address: str,
    endpoint: EndpointId,
    payload: bytes,
    options: CallOptions = DEFAULT_CALL_OPTIONS,
) -> StreamBuffer:
    """Open a call and return its items as a buffer to read.

    Raises:
        UnavailableError: if the address cannot be reached.
    """
    buffer = StreamBuffer()
    buffer.attach(await plane.open(address, endpoint, payload, buffer, options))
    return buffer


async def call_unary(
    plane: RequestPlane,
    address: str,
    endpoint: EndpointId,
    payload: bytes,
    options: CallOptions = DEFAULT_CALL_OPTIONS,
) -> bytes:
    """Open a call, return its only item. Cancelling the wait kills the call.

    Raises:
        DynamoError: what ended the call.
        BackendProtocolError: if the call ended without an item, or gave more than one.
    """
    async with await open_stream(plane, address, endpoint, payload, options) as stream:
        items = await stream.receive()
        if not items:
            raise BackendProtocolError(f"{endpoint} answered nothing", reason="backend.stream_incomplete")
        if len(items) > 1 or await stream.receive():
            raise BackendProtocolError(f"{endpoint} answered more than the one item expected")
    return items[0]
