"""What the NATS request plane does when NATS or a peer is lost."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import ConfigurationError, InvalidRequestError, UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_core.streams import call_unary, open_stream
from dynamo_runtime._plane.nats import NatsRequestPlane, nats_request_plane

ENDPOINT = EndpointId("test", "backend", "generate")


async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload)
    if payload == b"stay":
        await context.wait_stopped()


async def opened(server: Any, **options: object) -> NatsRequestPlane:
    made = nats_request_plane(
        f"nats://{server.host_port}", clock=SystemClock(), options={"reconnect_interval_s": 0.05, **options}
    )
    assert isinstance(made, NatsRequestPlane)
    await made.start()
    return made


async def test_killed_nats_ends_calls_as_migratable_and_new_ones_go_through_after_its_return(
    own_nats: Any, until: Any
) -> None:
    server, client = await opened(own_nats), await opened(own_nats)
    served = await server.serve(ENDPOINT, handler)
    stream = await open_stream(client, served.address, ENDPOINT, b"stay")
    assert await asyncio.wait_for(stream.receive(), 10) == [b"stay"]
    own_nats.kill()
    with pytest.raises(UnavailableError) as caught:
        await asyncio.wait_for(stream.receive(), 10)
    assert caught.value.reason == "transport.disconnected"
    assert caught.value.migratable
    assert client.faults["disconnected"] == 1
    await until(lambda: served.in_flight == 0)
    with pytest.raises(UnavailableError) as refused:
        await call_unary(client, served.address, ENDPOINT, b"x")
    assert refused.value.reason == "transport.cannot_connect"
    own_nats.start()
    async with asyncio.timeout(20):
        while True:
            try:
                assert await call_unary(client, served.address, ENDPOINT, b"x") == b"x"
                break
            except UnavailableError:
                await asyncio.sleep(0.02)
    await client.close()
    await server.close()


async def test_stopped_nats_is_noticed_by_keepalive(own_nats: Any) -> None:
    server = await opened(own_nats)
    client = await opened(own_nats, keepalive_interval_s=0.1, keepalive_timeout_s=0.2)
    served = await server.serve(ENDPOINT, handler)
    stream = await open_stream(client, served.address, ENDPOINT, b"stay")
    assert await asyncio.wait_for(stream.receive(), 10) == [b"stay"]
    own_nats.signal(signal.SIGSTOP)
    with pytest.raises(UnavailableError) as caught:
        await asyncio.wait_for(stream.receive(), 10)
    assert caught.value.reason == "transport.disconnected"
    assert client.faults["keepalive"] == 1
    own_nats.signal(signal.SIGCONT)
    await client.close()
    await server.close()


async def test_message_lost_on_its_way_ends_the_connection(shared_nats: Any) -> None:
    server, client = await opened(shared_nats), await opened(shared_nats)
    served = await server.serve(ENDPOINT, handler)
    stream = await open_stream(client, served.address, ENDPOINT, b"stay")
    assert await asyncio.wait_for(stream.receive(), 10) == [b"stay"]
    (transport,) = client._transports
    transport._heard += 1
    server_call = await open_stream(client, served.address, ENDPOINT, b"x")
    with pytest.raises(UnavailableError) as caught:
        await asyncio.wait_for(server_call.receive(), 10)
    assert "lost on its way" in caught.value.diagnostic
    assert client.faults["disconnected"] == 1
    assert await call_unary(client, served.address, ENDPOINT, b"x") == b"x"
    await client.close()
    await server.close()


async def test_nobody_there_is_unavailable_after_the_startup_limit() -> None:
    plane = nats_request_plane("nats://127.0.0.1:1", clock=SystemClock(), options={"startup_timeout_s": 0.2})
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 cannot be reached"):
        await plane.start()
    await plane.close()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nats://host", "nats://host/>", "nats://host/a*"])
async def test_wrong_address_is_an_invalid_request(shared_nats: Any, address: str) -> None:
    client = await opened(shared_nats)
    with pytest.raises(InvalidRequestError):
        await call_unary(client, address, ENDPOINT, b"x")
    await client.close()


@pytest.mark.parametrize(
    ("url", "options", "named"),
    [
        ("nats://", {}, "nats://host:port"),
        ("nats://a,,b", {}, "nats://host:port"),
        ("nats://a?colour=red", {}, "colour"),
        ("nats://a", {"ping_interval_s": 0}, "ping_interval_s"),
        ("nats://a", {"tls_ca": "/absent"}, "tls_ca /absent"),
    ],
)
def test_wrong_urls_and_options_are_named(url: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        nats_request_plane(url, clock=SystemClock(), options=options)
