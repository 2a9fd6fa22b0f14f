"""Costs of the request plane: CPU per unary round trip, and token frames per CPU-second at 64 streams.

Server and client are processes of their own; each reports the CPU time it used, so the figures hold on a busy machine.
Run: ``uv run python packages/dynamo-runtime/bench/plane_bench.py [--loop asyncio|uvloop] [--repeats 5]``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence

import uvloop

from dynamo_core.clock import SystemClock
from dynamo_core.errors import DynamoError
from dynamo_core.ids import EndpointId
from dynamo_core.planes import Call, CallOptions, RequestContext, ResponseSink
from dynamo_core.streams import call_unary
from dynamo_runtime._plane.plane import TcpRequestPlane

ECHO = EndpointId("bench", "plane", "echo")
TOKENS = EndpointId("bench", "plane", "tokens")
CPU = EndpointId("bench", "plane", "cpu")
STREAMS = 64
ITEM = bytes(32)


class Engine:
    """Sends one item to each running stream a step, as an engine does."""

    def __init__(self) -> None:
        self._streams: list[tuple[ResponseSink, asyncio.Future[None], list[int]]] = []

    async def serve(self, payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        """Join the batch; the last stream to come runs it."""
        done = asyncio.get_running_loop().create_future()
        self._streams.append((sink, done, [int(payload)]))
        if len(self._streams) == STREAMS:
            streams, self._streams = self._streams, []
            await self._run(streams)
        await done

    async def _run(self, streams: list[tuple[ResponseSink, asyncio.Future[None], list[int]]]) -> None:
        count = streams[0][2][0]
        for _ in range(count):
            for sink, _, _ in streams:
                sink.send(ITEM)
            if streams[0][0].credit <= 0:
                for sink, _, _ in streams:
                    await sink.wait_credit()
            await asyncio.sleep(0)
        for _, done, _ in streams:
            done.set_result(None)


class Reader:
    """A receiver that grants what it takes, as a frontend does."""

    def __init__(self, done: asyncio.Semaphore) -> None:
        self.call: Call | None = None
        self.count = 0
        self._done = done

    def on_items(self, items: Sequence[bytes]) -> None:
        """Count and grant."""
        self.count += len(items)
        if self.call is not None:
            self.call.grant(len(items))

    def on_end(self, error: DynamoError | None) -> None:
        """Count the end."""
        assert error is None, error
        self._done.release()


async def serve() -> None:
    """Serve until standard input ends."""

    async def echo(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(payload)

    async def cpu(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(repr(time.process_time()).encode())

    plane = TcpRequestPlane("tcp://127.0.0.1:0", clock=SystemClock())
    await plane.start()
    for endpoint, handler in ((TOKENS, Engine().serve), (CPU, cpu)):
        await plane.serve(endpoint, handler)
    say((await plane.serve(ECHO, echo)).address)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await plane.close()


async def unary(plane: TcpRequestPlane, address: str, count: int, width: int) -> None:
    """Make ``count`` calls, ``width`` at a time."""

    async def worker() -> None:
        for _ in range(count // width):
            await call_unary(plane, address, ECHO, b"x" * 64)

    await asyncio.gather(*(worker() for _ in range(width)))


async def stream(plane: TcpRequestPlane, address: str, count: int) -> None:
    """Read ``count`` items from each of 64 streams."""
    done = asyncio.Semaphore(0)
    readers = [Reader(done) for _ in range(STREAMS)]
    for reader in readers:
        payload = b"%d" % count
        reader.call = await plane.open(address, TOKENS, payload, reader, CallOptions(credit_items=256))
    for _ in readers:
        await done.acquire()
    assert [reader.count for reader in readers] == [count] * STREAMS


async def measure(loop: str, repeats: int) -> None:
    """Start a server process, measure against it, and print."""
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--serve",
        "--loop",
        loop,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    address = (await server.stdout.readline()).decode().strip()
    plane = TcpRequestPlane("tcp://127.0.0.1:0", clock=SystemClock())
    await plane.start()

    async def cpu() -> tuple[float, float]:
        return time.process_time(), float(await call_unary(plane, address, CPU, b""))

    for name, calls, width in (("unary, one at a time", 5000, 1), ("unary, 64 at once", 20000, 64)):
        both: list[float] = []
        for _ in range(repeats):
            client, peer = await cpu()
            await unary(plane, address, calls, width)
            client_end, peer_end = await cpu()
            both.append((client_end - client + peer_end - peer) / calls * 1e6)
        say(f"{name}: {show(both)} us CPU both sides (limit 60)")
    sent: list[float] = []
    received: list[float] = []
    count = 5000
    for _ in range(repeats):
        client, peer = await cpu()
        await stream(plane, address, count)
        client_end, peer_end = await cpu()
        received.append(STREAMS * count / (client_end - client) / 1e3)
        sent.append(STREAMS * count / (peer_end - peer) / 1e3)
    say(f"token frames at {STREAMS} streams, sending:   {show(sent)} thousand per CPU-second (limit 500)")
    say(f"token frames at {STREAMS} streams, receiving: {show(received)} thousand per CPU-second (limit 500)")
    await plane.close()
    await server.communicate()


def say(text: str) -> None:
    """Write a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show(values: list[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(values):.1f} [{min(values):.1f}..{max(values):.1f}]"


def main() -> None:
    """Read the flags and run one side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="uvloop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    run = uvloop.run if options.loop == "uvloop" else asyncio.run
    if options.serve:
        run(serve())
    else:
        say(f"loop {options.loop}, {options.repeats} repeats: median [min..max]")
        run(measure(options.loop, options.repeats))


if __name__ == "__main__":
    main()
