"""What the TCP request plane does when peers are lost, stopped, hostile or of another kind."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.clock import SystemClock
from dynamo_core.errors import (
    BackendProtocolError,
    UnavailableError,
)
from dynamo_core.ids import EndpointId
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink
from dynamo_core.streams import call_unary, open_stream
from dynamo_runtime._plane.framing import PREFACE, Batch, Hello, Open, encode
from dynamo_runtime._plane.options import PlaneOptions
from dynamo_runtime._plane.plane import TcpRequestPlane

ENDPOINT = EndpointId("test", "backend", "generate")
TCP = "tcp://127.0.0.1:0"


async def echo(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload)


# Peers that are lost.


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_killed_server_ends_its_streams_with_a_typed_error(scheme: str, tmp_path: Path, spawn: Any) -> None:
    child = await spawn("serve", TCP if scheme == "tcp" else f"unix://{tmp_path}")
    address = await child.line()
    client = TcpRequestPlane(TCP, clock=SystemClock())
    streams = [await open_stream(client, address, ENDPOINT, b"x") for _ in range(20)]
    for stream in streams:
        assert await stream.receive() == [b"x"]
    child.process.kill()
    for stream in streams:
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(stream.receive(), 10)
        assert caught.value.reason == "transport.disconnected"
        assert caught.value.migratable
    assert client.faults["disconnected"] == 1
    with pytest.raises(UnavailableError) as refused:
        await call_unary(client, address, ENDPOINT, b"end")
    assert refused.value.reason == "transport.cannot_connect"
    await client.close()


async def test_stopped_server_is_noticed(spawn: Any) -> None:
    child = await spawn("serve", TCP)
    address = await child.line()
    options = PlaneOptions(keepalive_interval_s=0.1, keepalive_timeout_s=0.2)
    client = TcpRequestPlane(TCP, clock=SystemClock(), options=options)
    await client.start()
    stream = await open_stream(client, address, ENDPOINT, b"x")
    assert await stream.receive() == [b"x"]
    child.process.send_signal(signal.SIGSTOP)
    with pytest.raises(UnavailableError) as caught:
        await asyncio.wait_for(stream.receive(), 10)
    assert caught.value.reason == "transport.disconnected"
    assert "no answer to a ping" in caught.value.diagnostic
    assert client.faults["keepalive"] == 1
    child.process.send_signal(signal.SIGCONT)
    assert await asyncio.wait_for(call_unary(client, address, ENDPOINT, b"end"), 10) == b"end"
    await client.close()


async def test_silent_but_healthy_peer_stays_connected(until: Any, planes: Any) -> None:
    async with planes(keepalive_interval_s=0.02, keepalive_timeout_s=0.04) as (_, client, address):
        await call_unary(client, address, ENDPOINT, b"x")
        started = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() - started > 0.3)
        assert await call_unary(client, address, ENDPOINT, b"x") == b"x"
        assert client.connects == 1


async def test_peer_that_accepts_and_never_greets_cannot_be_connected_to() -> None:
    accepted: list[asyncio.StreamWriter] = []
    async with await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0) as mute:
        address = f"tcp://127.0.0.1:{mute.sockets[0].getsockname()[1]}"
        client = TcpRequestPlane(TCP, clock=SystemClock(), options=PlaneOptions(connect_timeout_s=0.1))
        results = await asyncio.gather(
            *(call_unary(client, address, ENDPOINT, b"x") for _ in range(3)), return_exceptions=True
        )
        for error in results:
            assert isinstance(error, UnavailableError)
            assert error.reason == "transport.cannot_connect"
        assert len(accepted) == 1
        await client.close()
        for writer in accepted:
            writer.close()


async def test_server_of_another_protocol_cannot_be_connected_to() -> None:
    def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as other:
        address = f"tcp://127.0.0.1:{other.sockets[0].getsockname()[1]}"
        client = TcpRequestPlane(TCP, clock=SystemClock())
        with pytest.raises(UnavailableError) as caught:
            await call_unary(client, address, ENDPOINT, b"x")
        assert caught.value.reason == "transport.cannot_connect"
        assert "another protocol" in caught.value.diagnostic
        await client.close()


async def test_calls_share_one_connection_and_reconnect_after_a_loss(planes: Any) -> None:
    async with planes() as (server, client, address):
        await asyncio.gather(*(call_unary(client, address, ENDPOINT, b"x") for _ in range(50)))
        assert client.connects == 1
        port = int(address.rpartition(":")[2])
        await server.close()
        again = TcpRequestPlane(f"tcp://127.0.0.1:{port}", clock=SystemClock())
        await again.serve(ENDPOINT, echo)
        assert await call_unary(client, address, ENDPOINT, b"y") == b"y"
        assert client.connects == 2
        await again.close()


async def test_cancelled_open_leaves_the_connection_attempt_to_others(planes: Any) -> None:
    async with planes() as (_, client, address):
        doomed = asyncio.create_task(call_unary(client, address, ENDPOINT, b"x"))
        other = asyncio.create_task(call_unary(client, address, ENDPOINT, b"y"))
        await asyncio.sleep(0)
        doomed.cancel()
        assert await other == b"y"
        assert doomed.cancelled()


# Hostile and other input.


async def test_http_client_is_refused_and_the_server_goes_on(planes: Any, send_and_read: Any) -> None:
    async with planes() as (server, client, address):
        answer = await send_and_read(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(PREFACE)
        assert server.faults["malformed"] == 1
        assert await call_unary(client, address, ENDPOINT, b"x") == b"x"


@pytest.mark.parametrize(
    "data",
    [
        PREFACE + b"\xff\xff\xff\xff",
        PREFACE + (5).to_bytes(4, "big") + b"\xc1\xc1\xc1\xc1\xc1",
        PREFACE + encode(Batch([1], [[b"x"]], [], [])),
        PREFACE + encode(Hello(10)),
        PREFACE + encode(Open(1, str(ENDPOINT), b"x", 1)) * 2,
    ],
    ids=["too long", "no msgpack", "wrong side", "tiny limit", "call number twice"],
)
async def test_malformed_input_closes_the_connection_alone(data: bytes, planes: Any, send_and_read: Any) -> None:
    async with planes() as (server, client, address):
        stays = await open_stream(client, address, ENDPOINT, b"x")
        await send_and_read(address, data)
        assert server.faults["malformed"] == 1
        assert await stays.receive() == [b"x"]
        assert client.connects == 1


async def test_arbitrary_bytes_never_end_the_server(planes: Any, dial: Any) -> None:
    async with planes() as (_, client, address):

        async def attack(data: bytes) -> None:
            reader, writer = await dial(address)
            writer.write(PREFACE + encode(Hello(1 << 20)) + data)
            writer.write_eof()
            async with asyncio.timeout(10):
                with suppress(ConnectionResetError):
                    await reader.read()
            writer.close()

        attacks: list[bytes] = []

        @settings(max_examples=60, deadline=None)
        @given(st.binary(max_size=300))
        def collect(data: bytes) -> None:
            attacks.append(data)

        collect()
        for data in attacks:
            await attack(data)
        assert await call_unary(client, address, ENDPOINT, b"x") == b"x"


async def test_client_survives_a_server_that_sends_more_than_granted() -> None:
    async def cheat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        items = [b"x"] * 20
        writer.write(PREFACE + encode(Hello(1 << 20)))
        await reader.readexactly(len(PREFACE) + 20)
        writer.write(encode(Batch([1], [items], [], [])))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(cheat, "127.0.0.1", 0) as server:
        address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = TcpRequestPlane(TCP, clock=SystemClock(), options=PlaneOptions(max_buffer_items=4))
        stream = await open_stream(client, address, ENDPOINT, b"x", CallOptions(credit_items=8))
        with pytest.raises(BackendProtocolError, match="more items than it was granted"):
            await asyncio.wait_for(stream.receive(), 10)
        assert client.faults["overrun"] == 1
        await client.close()
