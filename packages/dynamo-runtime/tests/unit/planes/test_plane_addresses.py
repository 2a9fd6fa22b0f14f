"""Addresses, options and metrics of the TCP request plane."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import (
    ConfigurationError,
    InvalidRequestError,
)
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.streams import call_unary, open_stream
from dynamo_core.telemetry import Metrics
from dynamo_runtime._plane.plane import TcpRequestPlane, tcp_request_plane

ENDPOINT = EndpointId("test", "backend", "generate")
TCP = "tcp://127.0.0.1:0"


async def echo(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload)


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


async def test_two_servers_of_one_endpoint_in_a_process_have_addresses_of_their_own(planes: Any) -> None:
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


async def test_taken_port_is_a_configuration_error(planes: Any) -> None:
    async with planes() as (_, _client, address):
        other = TcpRequestPlane(address, clock=SystemClock())
        with pytest.raises(ConfigurationError, match="cannot listen"):
            await other.serve(ENDPOINT, echo)
        await other.close()


async def test_metrics_show_calls_connections_and_faults(send_and_read: Any) -> None:
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
