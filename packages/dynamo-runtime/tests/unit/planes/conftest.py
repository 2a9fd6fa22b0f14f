"""All tests of the planes run on asyncio's loop and on uvloop's."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvloop

from dynamo_core.clock import SystemClock
from dynamo_core.ids import EndpointId
from dynamo_core.planes import RequestContext, RequestHandler, ResponseSink
from dynamo_runtime._plane.options import PlaneOptions
from dynamo_runtime._plane.plane import TcpRequestPlane

CHILD = Path(__file__).with_name("child.py")


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Child:
    """A process that runs one of the programs in ``child.py``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        """Return the next line it says."""
        assert self.process.stdout is not None
        text = await asyncio.wait_for(self.process.stdout.readline(), 20)
        return text.decode().strip()

    def tell(self, text: str) -> None:
        """Write a line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")


Spawn = Callable[..., Awaitable[Child]]


@pytest_asyncio.fixture
async def spawn() -> AsyncIterator[Spawn]:
    """Start programs of ``child.py``; those that still run at the end are killed."""
    children: list[Child] = []

    async def start(*arguments: object) -> Child:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(CHILD),
            *map(str, arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        children.append(Child(process))
        return children[-1]

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
        await child.process.communicate()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Wait for a condition, at most 20 s."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture
def planes() -> Callable[..., AbstractAsyncContextManager[tuple[TcpRequestPlane, TcpRequestPlane, str]]]:
    """Open a TCP plane that serves ``test.backend.generate``, one that calls, and yield them with the address."""
    return _planes


@pytest.fixture
def dial() -> Callable[[str], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """Open a socket to a ``tcp://`` address."""
    return _dial


@pytest.fixture
def send_and_read() -> Callable[[str, bytes], Awaitable[bytes]]:
    """Send bytes on a socket of its own and return all that comes back until the server closes."""
    return _send_and_read


@asynccontextmanager
async def _planes(
    handler: RequestHandler | None = None, **options: Any
) -> AsyncIterator[tuple[TcpRequestPlane, TcpRequestPlane, str]]:
    server, client = (
        TcpRequestPlane("tcp://127.0.0.1:0", clock=SystemClock(), options=PlaneOptions(**options)) for _ in range(2)
    )
    await server.start()
    await client.start()
    try:
        served = await server.serve(EndpointId("test", "backend", "generate"), handler or _echo)
        yield server, client, served.address
    finally:
        await client.close()
        await server.close()


async def _echo(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    sink.send(payload)


async def _dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _send_and_read(address: str, data: bytes) -> bytes:
    reader, writer = await _dial(address)
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
