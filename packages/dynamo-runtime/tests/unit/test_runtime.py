from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.errors import ConflictError, InvalidRequestError, UnavailableError
from dynamo_core.planes import RequestContext, ResponseSink
from dynamo_runtime import Runtime, RuntimeSettings

NAME = "demo.text.shout"


@pytest.fixture(params=["mem", "tcp", "unix"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RuntimeSettings]:
    planes: dict[str, dict[str, Any]] = {
        "mem": {"discovery": "mem://", "request_plane": "mem://"},
        "tcp": {"discovery": f"file://{tmp_path}/d", "request_plane": "tcp://127.0.0.1:0"},
        "unix": {"discovery": f"file://{tmp_path}/d", "request_plane": f"unix://{tmp_path}/s"},
    }
    yield RuntimeSettings(event_bus="mem://", **planes[request.param])


async def shout(payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload.upper())


async def refuse(payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
    raise ConflictError("not today", reason="shout.refused")


async def test_a_served_endpoint_is_found_and_called(settings: RuntimeSettings) -> None:
    async with Runtime(settings) as runtime:
        await runtime.serve(NAME, shout)
        assert await runtime.call(NAME, b"hello") == b"HELLO"


async def test_what_a_handler_raises_reaches_the_caller(settings: RuntimeSettings) -> None:
    async with Runtime(settings) as runtime:
        await runtime.serve(NAME, refuse)
        with pytest.raises(ConflictError) as caught:
            await runtime.call(NAME, b"hello")
        assert caught.value.reason == "shout.refused"


async def test_calls_take_turns_over_instances(settings: RuntimeSettings) -> None:
    counts = [0, 0]

    def handler(index: int) -> Any:
        async def count(payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
            counts[index] += 1
            sink.send(b"")

        return count

    async with Runtime(settings) as runtime, Runtime(settings) as other:
        # Two processes share a store only where there is one outside of them.
        second = runtime if settings.discovery == "mem://" else other
        await runtime.serve("demo.text.one", handler(0))
        await second.serve("demo.text.two", handler(1))
        for _ in range(2):
            await runtime.call("demo.text.one", b"")
            await runtime.call("demo.text.two", b"")
    assert counts == [2, 2]


async def test_a_drained_endpoint_is_gone(settings: RuntimeSettings) -> None:
    async with Runtime(settings) as runtime:
        announced = await runtime.serve(NAME, shout)
        assert len(await runtime.instances(NAME)) == 1
        assert await announced.drain(1.0)
        assert await runtime.instances(NAME) == []
        with pytest.raises(UnavailableError, match=f"nobody serves {NAME}"):
            await runtime.call(NAME, b"hello")


async def test_a_drain_waits_for_a_running_call(settings: RuntimeSettings) -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(payload: bytes, call: RequestContext, sink: ResponseSink) -> None:
        entered.set()
        await release.wait()
        sink.send(b"done")

    async with Runtime(settings) as runtime:
        announced = await runtime.serve(NAME, slow)
        calling = asyncio.create_task(runtime.call(NAME, b""))
        await entered.wait()
        draining = asyncio.create_task(announced.drain(20.0))
        release.set()
        assert await draining
        assert await calling == b"done"


async def test_a_name_needs_three_parts(settings: RuntimeSettings) -> None:
    async with Runtime(settings) as runtime:
        with pytest.raises(InvalidRequestError, match=r"namespace\.component\.endpoint"):
            await runtime.call("shout", b"")
