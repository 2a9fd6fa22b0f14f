"""The reader's view of a call: order, credit, ends."""

import asyncio

import pytest

from dynamo_core.errors import BackendProtocolError, UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.memory import MemoryRequestPlane
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.streams import StreamBuffer, call_unary

ENDPOINT = EndpointId("ns", "backend", "generate")


class RecordedCall:
    def __init__(self) -> None:
        self.granted: list[int] = []
        self.cancelled: list[bool] = []

    def grant(self, items: int) -> None:
        self.granted.append(items)

    def cancel(self, *, kill: bool = False) -> None:
        self.cancelled.append(kill)


async def test_items_come_together_and_are_granted_back() -> None:
    buffer, call = StreamBuffer(), RecordedCall()
    buffer.attach(call)
    buffer.on_items([b"1", b"2"])
    buffer.on_items([b"3"])
    assert await buffer.receive() == [b"1", b"2", b"3"]
    assert call.granted == [3]


async def test_items_read_before_the_call_is_known_are_granted_later() -> None:
    buffer, call = StreamBuffer(), RecordedCall()
    buffer.on_items([b"1", b"2"])
    assert await buffer.receive() == [b"1", b"2"]
    buffer.attach(call)
    assert call.granted == [2]


async def test_nothing_is_granted_after_the_end() -> None:
    buffer, call = StreamBuffer(), RecordedCall()
    buffer.attach(call)
    buffer.on_items([b"1"])
    buffer.on_end(None)
    assert await buffer.receive() == [b"1"]
    assert await buffer.receive() == []
    assert await buffer.receive() == []
    assert call.granted == []


async def test_error_comes_after_the_last_item_and_again() -> None:
    buffer = StreamBuffer()
    buffer.on_items([b"1"])
    buffer.on_end(UnavailableError("lost"))
    assert await buffer.receive() == [b"1"]
    for _ in range(2):
        with pytest.raises(UnavailableError, match="lost"):
            await buffer.receive()


async def test_cancelled_wait_loses_nothing() -> None:
    buffer = StreamBuffer()
    waiting = asyncio.create_task(buffer.receive())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    buffer.on_items([b"1"])
    assert await buffer.receive() == [b"1"]


async def test_waiting_reader_is_woken_by_items_and_end() -> None:
    buffer = StreamBuffer()
    reader = asyncio.create_task(_collect(buffer))
    for value in (b"1", b"2"):
        await asyncio.sleep(0)
        buffer.on_items([value])
    await asyncio.sleep(0)
    buffer.on_end(None)
    assert await reader == [b"1", b"2"]


async def test_leaving_early_kills_and_leaving_late_does_not() -> None:
    early, late = RecordedCall(), RecordedCall()
    for call, ends in ((early, False), (late, True)):
        buffer = StreamBuffer()
        buffer.attach(call)
        async with buffer:
            if ends:
                buffer.on_end(None)
    assert (early.cancelled, late.cancelled) == ([True], [])


@pytest.mark.parametrize(("items", "reason"), [(0, "backend.stream_incomplete"), (2, "backend.protocol")])
async def test_unary_call_takes_exactly_one_item(items: int, reason: str) -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        for _ in range(items):
            sink.send(b"x")
            await asyncio.sleep(0)

    plane = MemoryRequestPlane()
    served = await plane.serve(ENDPOINT, handler)
    with pytest.raises(BackendProtocolError) as caught:
        await call_unary(plane, served.address, ENDPOINT, b"")
    assert caught.value.reason == reason
    await plane.close()


async def _collect(buffer: StreamBuffer) -> list[bytes]:
    return [item async for item in buffer]
