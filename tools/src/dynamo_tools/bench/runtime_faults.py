"""How long until everything is whole again after a server failed, with the default options.

The table is in docs/operations/faults.md; ``runtime_losses`` has the faults of peers, paths, disks and clocks.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import RecordPut, WatchSynced
from dynamo_core.errors import DynamoError, UnavailableError
from dynamo_core.events import SequenceGap
from dynamo_core.memory import MemoryDiscovery
from dynamo_core.planes import Topic
from dynamo_core.streams import call_unary
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.runtime_discovery import etcd_command, free_port
from dynamo_tools.bench.runtime_peer import ECHO, HOLD, echo, hold
from dynamo_tools.bench.runtime_road import Road

RECORDS = 100
EVENTS = Topic("events", "bench")


def run(options: Options) -> list[Figure]:
    """Cause each fault and time what follows."""
    faults: dict[str, tuple[Callable[[], Coroutine[Any, Any, float]], float]] = {
        "whole_after_etcd_killed_10_s": (_etcd_killed, 2.5),
        "whole_after_etcd_empty": (_etcd_empty, 2.5),
        "whole_after_etcd_compacted": (_etcd_compacted, 2.5),
        "noticed_etcd_stopped": (_etcd_stopped, 12.0),
        "whole_after_nats_killed": (_nats_killed, 1.5),
        "whole_bus_after_nats_killed": (_nats_killed_under_a_bus, 1.5),
    }
    figures: list[Figure] = []
    for name, (fault, limit_s) in faults.items():
        runs = [uvloop.run(fault()) for _ in range(1 if options.quick else 3)]
        figures.append(Figure.of(name, runs, unit="s", better="lower", limit_value=limit_s))
    return figures


class Server:
    """A server to kill and to start again.

    Args:
        command: What runs it.
        port: Where it listens.
    """

    def __init__(self, command: list[str], port: int) -> None:
        if shutil.which(command[0]) is None:
            raise LookupError(f"the benchmark needs {command[0]}; install Debian's package of it")
        self._command = command
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it and wait until it accepts connections."""
        self._launch()
        await _succeeds(self._accepts)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _launch(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def _accepts(self) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.close()


@asynccontextmanager
async def _etcd() -> AsyncGenerator[tuple[Server, Path, int]]:
    with tempfile.TemporaryDirectory() as folder:
        data, port = Path(folder) / "data", free_port()
        server = Server(etcd_command(data, port), port)
        await server.start()
        try:
            yield server, data, port
        finally:
            server.kill()


@asynccontextmanager
async def _clients(*ports: int) -> AsyncGenerator[list[Any]]:
    factory = plugins.load("discoveries", "etcd")
    clients = [factory(f"etcd://127.0.0.1:{port}", clock=SystemClock(), options={}) for port in ports]
    for client in clients:
        await client.start()
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()


async def _etcd_killed() -> float:
    return await _etcd_away(10.0, wipe=False)


async def _etcd_empty() -> float:
    return await _etcd_away(2.0, wipe=True)


async def _etcd_away(away_s: float, *, wipe: bool) -> float:
    """Time from the server's return until it knows all records again and a watch has come to it."""
    async with _etcd() as (server, data, port), _clients(port, port) as (owner, other):
        lease = await owner.lease()
        for number in range(RECORDS):
            await owner.put(f"v1/bench/{number}", b"x", lease=lease)
        watch = _Synced(other)
        await watch.reaches(1)
        server.kill()
        if wipe:
            shutil.rmtree(data)
        await asyncio.sleep(away_s)
        await server.start()
        begun_s = time.monotonic()

        async def whole() -> None:
            found = await other.list("v1/bench/")
            if len(found) < RECORDS or not lease.valid:
                raise UnavailableError("records are missing")

        await asyncio.gather(watch.reaches(2), _succeeds(whole))
        return time.monotonic() - begun_s


async def _etcd_compacted() -> float:
    """Time from the return of a watch's path until it has what it missed, which etcd has compacted away."""
    async with _etcd() as (_, _data, port), Road(port) as road, _clients(port, road.port) as (owner, other):
        await owner.put("v1/bench/stays", b"x")
        await owner.put("v1/bench/gone", b"x")
        watch = _Synced(other)
        await watch.reaches(1)
        await road.break_off()
        for number in range(RECORDS):
            await owner.put(f"v1/bench/{number}", b"x")
        await owner.delete("v1/bench/gone")
        revision = await owner.put("v1/bench/last", b"x")
        body = {"revision": str(revision), "physical": True}
        async with aiohttp.ClientSession() as session:
            answer = await session.post(f"http://127.0.0.1:{port}/v3/kv/compaction", json=body)
            answer.raise_for_status()
        begun_s = time.monotonic()
        await road.restore()
        await watch.reaches(2)
        assert watch.keys == {f"v1/bench/{name}" for name in ("stays", "last", *range(RECORDS))}
        return time.monotonic() - begun_s


async def _etcd_stopped() -> float:
    """Time until a client says that a server does not answer that stands still."""
    async with _etcd() as (server, _, port), _clients(port) as (client,):
        server.signal(signal.SIGSTOP)
        begun_s = time.monotonic()

        async def noticed() -> None:
            if client.status().connected:
                raise UnavailableError("not yet")

        await _succeeds(noticed)
        took_s = time.monotonic() - begun_s
        server.signal(signal.SIGCONT)
        return took_s


class _Synced:
    """A watch: how often it was complete, and what it shows."""

    def __init__(self, discovery: Any) -> None:
        self.keys: set[str] = set()
        self._times = 0
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._follow(discovery))

    async def reaches(self, times: int) -> None:
        while self._times < times:
            self._changed.clear()
            await self._changed.wait()

    async def _follow(self, discovery: Any) -> None:
        async for event in discovery.watch("v1/bench/"):
            if isinstance(event, WatchSynced):
                self._times += 1
                self._changed.set()
            elif isinstance(event, RecordPut):
                self.keys.add(event.key)
            else:
                self.keys.discard(event.key)


@asynccontextmanager
async def _nats() -> AsyncGenerator[tuple[Server, str]]:
    port = free_port()
    server = Server(["nats-server", "-a", "127.0.0.1", "-p", str(port)], port)
    await server.start()
    try:
        yield server, f"nats://127.0.0.1:{port}"
    finally:
        server.kill()


async def _nats_killed() -> float:
    """Time from the server's return until a call goes through again."""
    async with _nats() as (server, url):
        one, other = (plugins.load("request_planes", "nats")(url, clock=SystemClock(), options={}) for _ in range(2))
        await one.start()
        await other.start()
        served = await one.serve(ECHO, echo)
        await one.serve(HOLD, hold)
        await call_unary(other, served.address, ECHO, b"x")
        server.kill()
        await asyncio.sleep(1.0)
        await server.start()
        begun_s = time.monotonic()
        await _succeeds(lambda: call_unary(other, served.address, ECHO, b"x"))
        took_s = time.monotonic() - begun_s
        await other.close()
        await one.close()
    return took_s


async def _nats_killed_under_a_bus() -> float:
    """Time from the server's return until a subscriber has all events that were published meanwhile."""
    async with _nats() as (server, url):
        factory = plugins.load("event_buses", "nats")
        one, other = (factory(url, discovery=MemoryDiscovery(), clock=SystemClock(), options={}) for _ in range(2))
        await one.start()
        await other.start()
        subscription, publisher = await other.subscribe(EVENTS), await one.publisher(EVENTS)
        publisher.publish(b"before")
        last = (await anext(subscription)).sequence
        server.kill()
        await asyncio.sleep(1.0)
        for _ in range(RECORDS):
            publisher.publish(bytes(100_000))
            await asyncio.sleep(0)
        end = publisher.publish(b"last")
        await server.start()
        begun_s = time.monotonic()
        while last < end:
            item = await anext(subscription)
            if isinstance(item, SequenceGap):
                await _succeeds(functools.partial(subscription.replay, publisher.id, item.first, item.last))
                last = item.last
            else:
                last = item.sequence
        took_s = time.monotonic() - begun_s
        await other.close()
        await one.close()
    return took_s


async def _succeeds(attempt: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await attempt()
            except (OSError, DynamoError):
                await asyncio.sleep(0.02)
            else:
                return
