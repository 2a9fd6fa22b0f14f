"""The TCP request plane over paths that are slow, cut, half-open or reset."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo_core.clock import SystemClock
from dynamo_core.errors import UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import CallOptions, RequestContext, ResponseSink
from dynamo_core.streams import call_unary, open_stream
from dynamo_runtime._plane.options import PlaneOptions
from dynamo_runtime._plane.plane import TcpRequestPlane

ENDPOINT = EndpointId("test", "backend", "generate")


async def stay(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload)
    if payload == b"stay":
        await context.wait_stopped()


async def opened(**options: Any) -> TcpRequestPlane:
    made = TcpRequestPlane("tcp://127.0.0.1:0", clock=SystemClock(), options=PlaneOptions(**options))
    await made.start()
    return made


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_lost_path_ends_its_calls_on_both_sides_and_a_new_one_is_found(
    fault: str, proxy: Any, until: Any
) -> None:
    keepalive = {"keepalive_interval_s": 0.1, "keepalive_timeout_s": 0.2, "connect_timeout_s": 0.5}
    server, client = await opened(**keepalive), await opened(**keepalive)
    served = await server.serve(ENDPOINT, stay)
    between = await proxy(int(served.address.rpartition(":")[2]))
    address = f"tcp://127.0.0.1:{between.port}"
    stream = await open_stream(client, address, ENDPOINT, b"stay")
    assert await asyncio.wait_for(stream.receive(), 10) == [b"stay"]
    assert served.in_flight == 1
    if fault == "cut":
        between.cut()
    else:
        between.reset()
    with pytest.raises(UnavailableError) as caught:
        await asyncio.wait_for(stream.receive(), 10)
    assert caught.value.reason == "transport.disconnected"
    assert caught.value.migratable
    assert client.faults["disconnected"] == 1
    # A half-open connection: the server hears nothing of the loss and finds out by itself.
    await until(lambda: served.in_flight == 0)
    if fault == "cut":
        with pytest.raises(UnavailableError) as refused:
            await call_unary(client, address, ENDPOINT, b"x")
        assert refused.value.reason == "transport.cannot_connect"
        assert client.faults["keepalive"]
        assert server.faults["keepalive"]
    between.heal()
    assert await asyncio.wait_for(call_unary(client, address, ENDPOINT, b"x"), 10) == b"x"
    await client.close()
    await server.close()


async def test_slow_path_delays_and_breaks_nothing(proxy: Any) -> None:
    server, client = await opened(), await opened()
    served = await server.serve(ENDPOINT, stay)
    between = await proxy(int(served.address.rpartition(":")[2]))
    between.delay_s = 0.05
    address = f"tcp://127.0.0.1:{between.port}"
    options = CallOptions(deadline_s=10)
    answers = await asyncio.gather(
        *(call_unary(client, address, ENDPOINT, b"%d" % number, options) for number in range(20))
    )
    assert answers == [b"%d" % number for number in range(20)]
    assert client.connects == 1
    await client.close()
    await server.close()
