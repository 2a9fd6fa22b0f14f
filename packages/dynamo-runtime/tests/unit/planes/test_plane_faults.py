"""What the TCP request plane does when peers are lost, stopped, slow, hostile or of another kind."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.clock import SystemClock
from dynamo_core.errors import (
    BackendProtocolError,
    CapacityExhaustedError,
    ConfigurationError,
    DynamoError,
    InternalError,
    InvalidRequestError,
    PayloadTooLargeError,
    UnavailableError,
)
from dynamo_core.ids import EndpointId
from dynamo_core.planes import CallOptions, RequestContext, RequestHandler, ResponseSink
from dynamo_core.streams import call_unary, open_stream
from dynamo_core.telemetry import Metrics
from dynamo_runtime._plane.framing import PREFACE, Batch, Hello, Open, encode
from dynamo_runtime._plane.options import PlaneOptions
from dynamo_runtime._plane.plane import TcpRequestPlane, tcp_request_plane

ENDPOINT = EndpointId("test", "backend", "generate")
TCP = "tcp://127.0.0.1:0"


async def echo(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload)


@asynccontextmanager
async def planes(
    handler: RequestHandler = echo, **options: Any
) -> AsyncIterator[tuple[TcpRequestPlane, TcpRequestPlane, str]]:
    """Yield a serving plane, a calling plane and the address."""
    server = TcpRequestPlane(TCP, clock=SystemClock(), options=PlaneOptions(**options))
    client = TcpRequestPlane(TCP, clock=SystemClock(), options=PlaneOptions(**options))
    await server.start()
    await client.start()
    try:
        served = await server.serve(ENDPOINT, handler)
        yield server, client, served.address
    finally:
        await client.close()
        await server.close()


async def dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def send_and_read(address: str, data: bytes) -> bytes:
    """Send bytes on a socket of its own and return all that comes back until the server closes."""
    reader, writer = await dial(address)
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


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


async def test_silent_but_healthy_peer_stays_connected(until: Any) -> None:
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


async def test_calls_share_one_connection_and_reconnect_after_a_loss() -> None:
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


async def test_cancelled_open_leaves_the_connection_attempt_to_others() -> None:
    async with planes() as (_, client, address):
        doomed = asyncio.create_task(call_unary(client, address, ENDPOINT, b"x"))
        other = asyncio.create_task(call_unary(client, address, ENDPOINT, b"y"))
        await asyncio.sleep(0)
        doomed.cancel()
        assert await other == b"y"
        assert doomed.cancelled()


# Hostile and other input.


async def test_http_client_is_refused_and_the_server_goes_on() -> None:
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
async def test_malformed_input_closes_the_connection_alone(data: bytes) -> None:
    async with planes() as (server, client, address):
        stays = await open_stream(client, address, ENDPOINT, b"x")
        await send_and_read(address, data)
        assert server.faults["malformed"] == 1
        assert await stays.receive() == [b"x"]
        assert client.connects == 1


async def test_arbitrary_bytes_never_end_the_server() -> None:
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


# Limits.


async def test_item_over_the_limit_ends_its_call_as_too_large() -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(bytes(10_000))

    async with planes(handler, max_frame_bytes=8192) as (_, client, address):
        with pytest.raises(PayloadTooLargeError):
            await call_unary(client, address, ENDPOINT, b"x")


async def test_client_keeps_to_a_server_with_a_smaller_limit() -> None:
    async with planes(max_frame_bytes=8192) as (_, _client, address):
        generous = TcpRequestPlane(TCP, clock=SystemClock())
        with pytest.raises(PayloadTooLargeError):
            await call_unary(generous, address, ENDPOINT, bytes(10_000))
        assert await call_unary(generous, address, ENDPOINT, b"x") == b"x"
        await generous.close()


async def test_headers_count_against_the_limit() -> None:
    async with planes(max_frame_bytes=8192) as (_, client, address):
        with pytest.raises(PayloadTooLargeError):
            await call_unary(client, address, ENDPOINT, b"", CallOptions(headers={"x": "y" * 10_000}))


async def test_large_items_of_one_tick_are_spread_over_frames() -> None:
    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        for _ in range(40):
            sink.send(bytes(1 << 20))

    async with planes(handler, max_frame_bytes=4 << 20) as (_, client, address):
        stream = await open_stream(client, address, ENDPOINT, b"")
        assert [len(item) async for item in stream] == [1 << 20] * 40


async def test_handler_that_ignores_credit_is_ended(until: Any) -> None:
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


async def test_too_many_calls_are_refused_as_overloaded() -> None:
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


async def test_too_many_connections_are_refused() -> None:
    async with planes(max_connections=1) as (_, client, address):
        assert await call_unary(client, address, ENDPOINT, b"x") == b"x"
        other = TcpRequestPlane(TCP, clock=SystemClock())
        with pytest.raises(UnavailableError):
            await call_unary(other, address, ENDPOINT, b"x")
        await other.close()


async def test_slow_reader_holds_no_more_than_its_credit(until: Any) -> None:
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


async def test_peer_that_does_not_read_its_socket_bounds_the_server(until: Any) -> None:
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


async def test_a_thousand_streams_at_once() -> None:
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


async def test_receiver_that_fails_loses_only_its_call() -> None:
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


# Addresses and options.


async def test_wildcard_advertises_a_host_that_can_be_reached() -> None:
    server = TcpRequestPlane("tcp://0.0.0.0:0", clock=SystemClock())
    served = await server.serve(ENDPOINT, echo)
    assert not served.address.startswith("tcp://0.0.0.0")
    client = TcpRequestPlane(TCP, clock=SystemClock())
    assert await call_unary(client, served.address, ENDPOINT, b"x") == b"x"
    await client.close()
    await server.close()


async def test_advertised_host_can_be_given() -> None:
    server = tcp_request_plane("tcp://0.0.0.0:0?advertise=worker-7.example", clock=SystemClock(), options={})
    served = await server.serve(ENDPOINT, echo)
    assert served.address.startswith("tcp://worker-7.example:")
    await server.close()


async def test_two_servers_of_one_endpoint_in_a_process_have_addresses_of_their_own() -> None:
    async def second(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(b"second")

    async with planes() as (server, client, address):
        other = await server.serve(ENDPOINT, second)
        assert other.address != address
        assert await call_unary(client, other.address, ENDPOINT, b"x") == b"second"
        assert await call_unary(client, address, ENDPOINT, b"x") == b"x"
        assert client.connects == 1


async def test_dead_sockets_are_swept_and_live_ones_kept(tmp_path: Path, spawn: Any) -> None:
    child = await spawn("serve", f"unix://{tmp_path}")
    dead = Path((await child.line()).removeprefix("unix://"))
    child.process.kill()
    await child.process.wait()
    assert dead.exists()
    one = TcpRequestPlane(f"unix://{tmp_path}", clock=SystemClock())
    live = await one.serve(ENDPOINT, echo)
    assert not dead.exists()
    two = TcpRequestPlane(f"unix://{tmp_path}", clock=SystemClock())
    await two.serve(ENDPOINT, echo)
    assert await call_unary(two, live.address, ENDPOINT, b"x") == b"x"
    await two.close()
    await one.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://x:1", "tcp://", "unix://", "tcp://host:port"])
def test_wrong_urls_are_named(url: str) -> None:
    with pytest.raises(ConfigurationError, match="request plane"):
        tcp_request_plane(url, clock=SystemClock(), options={})


@pytest.mark.parametrize("options", [{"max_calls": 0}, {"colour": "red"}, {"connect_timeout_s": "soon"}])
def test_wrong_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        tcp_request_plane(TCP, clock=SystemClock(), options=options)
    assert next(iter(options)) in str(caught.value)


async def test_wrong_address_is_an_invalid_request() -> None:
    client = TcpRequestPlane(TCP, clock=SystemClock())
    with pytest.raises(InvalidRequestError, match="neither tcp"):
        await call_unary(client, "http://x", ENDPOINT, b"x")
    await client.close()


async def test_taken_port_is_a_configuration_error() -> None:
    async with planes() as (_, _client, address):
        other = TcpRequestPlane(address, clock=SystemClock())
        with pytest.raises(ConfigurationError, match="cannot listen"):
            await other.serve(ENDPOINT, echo)
        await other.close()


async def test_metrics_show_calls_connections_and_faults() -> None:
    metrics = Metrics()
    server = tcp_request_plane(TCP, clock=SystemClock(), options={"metrics": metrics})
    entered = asyncio.Event()

    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        entered.set()
        await context.wait_stopped()

    served = await server.serve(ENDPOINT, handler)
    client = TcpRequestPlane(TCP, clock=SystemClock())
    await open_stream(client, served.address, ENDPOINT, b"")
    await asyncio.wait_for(entered.wait(), 10)
    await send_and_read(served.address, b"GET / HTTP/1.0\r\n\r\n")

    def read(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert read("dynamo_runtime_plane_served_calls") == 1
    assert read("dynamo_runtime_plane_connections") == 1
    assert read("dynamo_runtime_plane_faults_total", kind="malformed") == 1
    await client.close()
    await server.close()
