"""The TCP request plane keeps to its limits: sizes, calls, connections, and readers that do not read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import (
    CapacityExhaustedError,
    DynamoError,
    InternalError,
    PayloadTooLargeError,
    UnavailableError,
)
from dynamo_core.ids import EndpointId
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink
from dynamo_core.streams import call_unary, open_stream
from dynamo_runtime._plane.framing import PREFACE, Hello, Open, encode
from dynamo_runtime._plane.plane import TcpRequestPlane

ENDPOINT = EndpointId("test", "backend", "generate")
TCP = "tcp://127.0.0.1:0"


async def test_item_over_the_limit_ends_its_call_as_too_large(planes: Any) -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(bytes(10_000))

    async with planes(handler, max_frame_bytes=8192) as (_, client, address):
        with pytest.raises(PayloadTooLargeError):
            await call_unary(client, address, ENDPOINT, b"x")


async def test_client_keeps_to_a_server_with_a_smaller_limit(planes: Any) -> None:
    async with planes(max_frame_bytes=8192) as (_, _client, address):
        generous = TcpRequestPlane(TCP, clock=SystemClock())
        with pytest.raises(PayloadTooLargeError):
            await call_unary(generous, address, ENDPOINT, bytes(10_000))
        assert await call_unary(generous, address, ENDPOINT, b"x") == b"x"
        await generous.close()


async def test_headers_count_against_the_limit(planes: Any) -> None:
    async with planes(max_frame_bytes=8192) as (_, client, address):
        with pytest.raises(PayloadTooLargeError):
            await call_unary(client, address, ENDPOINT, b"", CallOptions(headers={"x": "y" * 10_000}))


async def test_large_items_of_one_tick_are_spread_over_frames(planes: Any) -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        for _ in range(40):
            sink.send(bytes(1 << 20))

    async with planes(handler, max_frame_bytes=4 << 20) as (_, client, address):
        stream = await open_stream(client, address, ENDPOINT, b"")
        assert [len(item) async for item in stream] == [1 << 20] * 40


async def test_handler_that_ignores_credit_is_ended(until: Any, planes: Any) -> None:
    ended: list[DynamoError] = []

    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        try:
            while True:
                sink.send(b"x")
        except DynamoError as error:
            ended.append(error)
            raise

    async with planes(handler, max_buffer_items=100) as (server, client, address):
        stream = await open_stream(client, address, ENDPOINT, b"", CallOptions(credit_items=10))
        with pytest.raises(CapacityExhaustedError) as caught:
            while await stream.receive():
                pass
        assert caught.value.reason == "capacity.slow_reader"
        assert server.faults["overrun"] == 1
        assert len(ended) == 1


async def test_too_many_calls_are_refused_as_overloaded(planes: Any) -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(b"x")
        await context.wait_stopped()

    async with planes(handler, max_calls=2) as (_, client, address):
        for _ in range(2):
            assert await (await open_stream(client, address, ENDPOINT, b"")).receive() == [b"x"]
        with pytest.raises(CapacityExhaustedError) as caught:
            await call_unary(client, address, ENDPOINT, b"")
        assert caught.value.reason == "capacity.worker_overloaded"
        assert caught.value.migratable


async def test_too_many_connections_are_refused(planes: Any) -> None:
    async with planes(max_connections=1) as (_, client, address):
        assert await call_unary(client, address, ENDPOINT, b"x") == b"x"
        other = TcpRequestPlane(TCP, clock=SystemClock())
        with pytest.raises(UnavailableError):
            await call_unary(other, address, ENDPOINT, b"x")
        await other.close()


async def test_slow_reader_holds_no_more_than_its_credit(until: Any, planes: Any) -> None:
    sent: list[int] = [0]

    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        while not context.stopped:
            await sink.wait_credit()
            sink.send(bytes(1024))
            sent[0] += 1

    class Idle:
        got = 0

        def on_items(self, items: Any) -> None:
            self.got += len(items)

        def on_end(self, error: DynamoError | None) -> None:
            self.error = error

    async with planes(handler) as (_, client, address):
        slow = Idle()
        call = await client.open(address, ENDPOINT, b"", slow, CallOptions(credit_items=50))
        await until(lambda: slow.got == 50)
        fast = await open_stream(client, address, ENDPOINT, b"")
        seen = 0
        while seen < 2000:
            seen += len(await fast.receive())
        assert slow.got == 50
        fast.cancel(kill=True)
        call.cancel(kill=True)


async def test_peer_that_does_not_read_its_socket_bounds_the_server(until: Any, planes: Any, dial: Any) -> None:
    sent: list[int] = [0]

    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        while not context.stopped:
            await sink.wait_credit()
            sink.send(bytes(64 << 10))
            sent[0] += 1
            await asyncio.sleep(0)

    credit = 500
    async with planes(handler) as (_, _, address):
        _, writer = await dial(address)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(PREFACE + encode(Hello(1 << 20)) + encode(Open(1, str(ENDPOINT), b"", credit)))
        await until(lambda: sent[0] == credit)
        writer.close()


async def test_a_thousand_streams_at_once(planes: Any) -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        for _ in range(20):
            await sink.wait_credit()
            sink.send(payload)
            await asyncio.sleep(0)

    async with planes(handler) as (_, client, address):
        options = CallOptions(credit_items=8)
        streams = [await open_stream(client, address, ENDPOINT, b"%d" % n, options) for n in range(1000)]

        async def read(stream: Any) -> list[bytes]:
            return [item async for item in stream]

        found = await asyncio.gather(*(read(stream) for stream in streams))
        assert found == [[b"%d" % n] * 20 for n in range(1000)]
        assert client.connects == 1


async def test_receiver_that_fails_loses_only_its_call(planes: Any) -> None:
    class Broken:
        def __init__(self) -> None:
            self.ended: asyncio.Future[DynamoError | None] = asyncio.get_running_loop().create_future()

        def on_items(self, items: Any) -> None:
            raise ValueError("broken")

        def on_end(self, error: DynamoError | None) -> None:
            self.ended.set_result(error)

    async with planes() as (_, client, address):
        broken = Broken()
        await client.open(address, ENDPOINT, b"x", broken)
        assert isinstance(await asyncio.wait_for(broken.ended, 10), InternalError)
        assert await call_unary(client, address, ENDPOINT, b"x") == b"x"
        assert client.connects == 1
