"""Whatever bytes a peer sends: its connection ends with a typed error, and nothing else does."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import nats
import pytest
import pytest_asyncio

from dynamo_core.clock import SystemClock
from dynamo_core.errors import DynamoError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestContext, RequestPlane, ResponseSink
from dynamo_core.streams import call_unary, open_stream
from dynamo_runtime._plane.framing import PREFACE, Batch, Cancel, Frame, Grant, Hello, Open, Ping, encode
from dynamo_runtime._plane.nats import SUBJECTS, nats_request_plane
from dynamo_runtime._plane.options import PlaneOptions
from dynamo_runtime._plane.plane import TcpRequestPlane

ENDPOINT = EndpointId("test", "backend", "generate")
FRAMES: list[Frame] = [
    Hello(1 << 20),
    Open(1, str(ENDPOINT), b"payload", 8, "r", 1.5, {"traceparent": "x"}, ""),
    Open(2, "no.such.endpoint", b"", 1),
    Batch([1, 2], [[b"a", b"b"], [b""]], [1], []),
    Grant([1], [5]),
    Cancel(2, True),
    Ping(),
]
WELL_FORMED = [encode(frame) for frame in FRAMES]
GREETING = PREFACE + WELL_FORMED[0]


async def stay(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload)
    if payload == b"stay":
        await context.wait_stopped()


@pytest_asyncio.fixture
async def made(shared_nats: Any, tmp_path: Path) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """Open planes by scheme."""
    planes: list[RequestPlane] = []

    async def make(scheme: str) -> RequestPlane:
        clock = SystemClock()
        if scheme == "nats":
            planes.append(nats_request_plane(f"nats://{shared_nats.host_port}", clock=clock, options={}))
        else:
            url = "tcp://127.0.0.1:0" if scheme == "tcp" else f"unix://{tmp_path}"
            planes.append(TcpRequestPlane(url, clock=clock, options=PlaneOptions()))
        await planes[-1].start()
        return planes[-1]

    yield make
    for plane in reversed(planes):
        await plane.close()


async def attack(address: str, data: bytes) -> None:
    """Connect, send, and read until the server closes."""
    scheme, _, place = address.partition("://")
    if scheme == "unix":
        reader, writer = await asyncio.open_unix_connection(place.partition("#")[0])
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(place.rpartition(":")[2]))
    writer.write(data)
    writer.write_eof()
    async with asyncio.timeout(20):
        with contextlib.suppress(OSError):
            await reader.read()
    writer.close()


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_sockets_take_any_bytes(scheme: str, made: Any, hostile: Any, flat_memory: Any) -> None:
    server, client = await made(scheme), await made(scheme)
    served = await server.serve(ENDPOINT, stay)
    other = await open_stream(client, served.address, ENDPOINT, b"stay")
    assert await other.receive() == [b"stay"]
    await attack(served.address, b"warm-up")
    with flat_memory():
        for data in hostile(WELL_FORMED):
            await attack(served.address, data)
            await attack(served.address, GREETING + data)
            # A length that promises much more than ever comes.
            await attack(served.address, GREETING + b"\x7f" + data)
    assert server.faults["malformed"] > 0
    assert await call_unary(client, served.address, ENDPOINT, b"x") == b"x"
    assert client.connects == 1
    assert served.in_flight == 1


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_callers_take_any_bytes_of_a_server(scheme: str, made: Any, hostile: Any, tmp_path: Path) -> None:
    """A false server answers each connection with something else; each call ends with a typed error."""
    answers: list[bytes] = []

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers.pop())
        with contextlib.suppress(OSError):
            await writer.drain()
            writer.write_eof()
            await reader.read()
        writer.close()

    client = await made(scheme)
    if scheme == "tcp":
        false = await asyncio.start_server(lie, "127.0.0.1", 0)
        address = f"tcp://127.0.0.1:{false.sockets[0].getsockname()[1]}"
    else:
        place = tmp_path / "false.sock"
        false = await asyncio.start_unix_server(lie, place)
        address = f"unix://{place}"
    honest = await made(scheme)
    served = await honest.serve(ENDPOINT, stay)
    async with false:
        for data in hostile(WELL_FORMED):
            answers[:] = [GREETING + data]
            try:
                await asyncio.wait_for(call_unary(client, address, ENDPOINT, b"x"), 20)
            except DynamoError as error:
                assert error.reason, data
            answers[:] = []
        assert await call_unary(client, served.address, ENDPOINT, b"x") == b"x"


async def test_nats_takes_any_messages(made: Any, shared_nats: Any, hostile: Any, flat_memory: Any) -> None:
    server, client = await made("nats"), await made("nats")
    served = await server.serve(ENDPOINT, stay)
    other = await open_stream(client, served.address, ENDPOINT, b"stay")
    assert await other.receive() == [b"stay"]
    name = served.address.rpartition("/")[2]
    enemy = await nats.connect(f"nats://{shared_nats.host_port}")
    with flat_memory():
        for data in hostile(WELL_FORMED):
            # Callers that ask for a connection in any words, and such as get one and then send anything.
            await enemy.publish(f"{SUBJECTS}.{name}", data, reply=f"{SUBJECTS}.nobody")
            await enemy.publish(f"{SUBJECTS}.{name}", data)
            number = secrets.randbits(96)
            await enemy.request(f"{SUBJECTS}.{name}", b"%x" % number, timeout=20)
            for count, piece in enumerate((GREETING, data)):
                await enemy.publish(f"{SUBJECTS}.s.{number:x}", count.to_bytes(8, "big") + b"\0" + piece)
            await enemy.publish(f"{SUBJECTS}.s.{number:x}", data)
        await enemy.publish(f"{SUBJECTS}.{name}", b"1" * 8192, reply="x")
        await enemy.flush()
        assert await asyncio.wait_for(call_unary(client, served.address, ENDPOINT, b"x"), 20) == b"x"
    assert server.faults["malformed"] > 0
    assert served.in_flight == 1
    assert client.connects == 1
    await enemy.close()
