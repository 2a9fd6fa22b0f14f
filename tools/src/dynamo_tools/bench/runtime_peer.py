"""The other side of the runtime's benchmarks, in a process of its own: ``python -m dynamo_tools.bench.runtime_peer``.

It says one line once it is ready and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from pathlib import Path

import uvloop

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import INSTANCES_PREFIX, Instance, WatchSynced
from dynamo_core.errors import UnavailableError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import Call, CallOptions, RequestContext, RequestPlane, ResponseSink
from dynamo_core.wire import INSTANCE

ECHO = EndpointId("bench", "plane", "echo")
TOKENS = EndpointId("bench", "plane", "tokens")
CPU = EndpointId("bench", "plane", "cpu")
HOLD = EndpointId("bench", "plane", "hold")
FLOOD = EndpointId("bench", "plane", "flood")
STREAMS = 64
ITEM = bytes(32)
FLOOD_ITEM_BYTES = 1024


class StepEngine:
    """Sends one item to each running stream a step, as an engine does."""

    def __init__(self) -> None:
        self._streams: list[tuple[ResponseSink, asyncio.Future[None]]] = []

    async def serve(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        """Join the batch; the last stream to come runs it."""
        done = asyncio.get_running_loop().create_future()
        self._streams.append((sink, done))
        if len(self._streams) == STREAMS:
            streams, self._streams = self._streams, []
            await self._run(streams, int(payload))
        await done

    async def _run(self, streams: list[tuple[ResponseSink, asyncio.Future[None]]], count: int) -> None:
        for _ in range(count):
            for sink, _ in streams:
                sink.send(ITEM)
            if streams[0][0].credit <= 0:
                for sink, _ in streams:
                    await sink.wait_credit()
            await asyncio.sleep(0)
        for _, done in streams:
            done.set_result(None)


class HeldCall:
    """A receiver that takes what comes and grants nothing."""

    def __init__(self, begun: asyncio.Semaphore) -> None:
        self.call: Call | None = None
        self._begun = begun
        self._silent = True

    def on_items(self, items: object) -> None:
        """Count the call as begun with its first item."""
        if self._silent:
            self._silent = False
            self._begun.release()

    def on_end(self, error: object) -> None:
        """Nothing is done about it."""


async def echo(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    """Answer with what came."""
    sink.send(payload)


async def cpu(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    """Answer with the CPU seconds of this process."""
    sink.send(repr(time.process_time()).encode())


async def hold(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    """Answer once, then wait for the caller to leave."""
    sink.send(ITEM)
    await context.wait_stopped()


async def flood(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
    """Send as much as the caller allows."""
    item = bytes(FLOOD_ITEM_BYTES)
    while not context.stopped:
        while sink.credit > 0:
            sink.send(item)
        await sink.wait_credit()


async def serve() -> None:
    """Serve all endpoints of the benchmarks; say the address."""
    plane = await started()
    handlers = {ECHO: echo, TOKENS: StepEngine().serve, CPU: cpu, HOLD: hold, FLOOD: flood}
    addresses = {(await plane.serve(endpoint, handler)).address for endpoint, handler in handlers.items()}
    say(addresses.pop())
    await input_ends()
    await plane.close()


async def call(address: str, endpoint: str, count: str, credit: str) -> None:
    """Open that many streams, say so once all have begun, and keep them open."""
    plane = await started()
    begun = asyncio.Semaphore(0)
    calls: list[HeldCall] = []
    for _ in range(int(count)):
        calls.append(HeldCall(begun))
        options = CallOptions(credit_items=int(credit))
        calls[-1].call = await plane.open(address, EndpointId.parse(endpoint), b"", calls[-1], options)
    for _ in calls:
        await begun.acquire()
    say("open")
    await input_ends()
    await plane.close()


async def register(url: str, count: str) -> None:
    """Register that many instances under one lease, and keep it."""
    discovery = plugins.load("discoveries", url.partition(":")[0])(url, clock=SystemClock(), options={})
    await discovery.start()
    lease = await discovery.lease()
    for number in range(int(count)):
        instance = Instance(ECHO, number + 1, f"tcp://10.0.0.1:{number + 1}")
        await discovery.put(instance.key, INSTANCE.encode(instance), lease=lease)
    say("registered")
    await input_ends()
    await discovery.close()


async def watch(url: str) -> None:
    """Be a process that serves nothing and watches the instances; say so once its view is complete."""
    discovery = plugins.load("discoveries", url.partition(":")[0])(url, clock=SystemClock(), options={})
    await discovery.start()
    plane = await started()
    await plane.serve(ECHO, echo)
    lease = await discovery.lease()
    await discovery.put("v1/bench", b"", lease=lease)

    async def follow() -> None:
        async for event in discovery.watch(INSTANCES_PREFIX):
            if isinstance(event, WatchSynced):
                say("synced")

    following = asyncio.create_task(follow())
    await input_ends()
    following.cancel()
    await plane.close()
    await discovery.close()


async def fill(folder: str) -> None:
    """Fill a small disk, make room, and say how long it takes until a record is written again."""
    discovery = plugins.load("discoveries", "file")(f"file://{folder}", clock=SystemClock(), options={})
    await discovery.start()
    lease = await discovery.lease()
    await discovery.put("v1/bench/kept", b"before", lease=lease)
    filler = Path(folder) / ".filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    try:
        await discovery.put("v1/bench/kept", bytes(8192), lease=lease)
    except UnavailableError:
        assert not discovery.status().connected
    else:
        raise AssertionError("a record fits a full disk")
    filler.unlink()
    begun_s = time.monotonic()
    assert (await discovery.get("v1/bench/kept")).value == b"before"
    await discovery.put("v1/bench/kept", b"after", lease=lease)
    say(repr(time.monotonic() - begun_s))
    await discovery.close()


async def started() -> RequestPlane:
    """Return a started TCP plane."""
    plane: RequestPlane = plugins.load("request_planes", "tcp")("tcp://127.0.0.1:0", clock=SystemClock(), options={})
    await plane.start()
    return plane


async def input_ends() -> None:
    """Wait for the end of standard input."""
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def say(text: str) -> None:
    """Write a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


PROGRAMS = {program.__name__: program for program in (serve, call, register, watch, fill)}

if __name__ == "__main__":
    uvloop.run(PROGRAMS[sys.argv[1]](*sys.argv[2:]))
