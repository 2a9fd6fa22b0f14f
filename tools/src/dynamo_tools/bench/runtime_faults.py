"""How long until everything is whole again after a fault, with the default options; see docs/operations/faults.md."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import WatchSynced
from dynamo_core.errors import DynamoError, UnavailableError
from dynamo_core.streams import call_unary, open_stream
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.runtime_discovery import etcd_command, free_port
from dynamo_tools.bench.runtime_peer import ECHO, HOLD, echo, hold, started
from dynamo_tools.bench.runtime_plane import peer, said

RECORDS = 100
_LIMITS_S = {
    "whole_after_etcd_killed_10_s": 2.5,
    "whole_after_etcd_empty": 2.5,
    "noticed_peer_killed": 1.0,
    "noticed_peer_stopped": 40.0,
    "whole_after_nats_killed": 1.5,
}


def run(options: Options) -> list[Figure]:
    """Cause each fault and time what follows."""
    measured = {
        "whole_after_etcd_killed_10_s": _etcd_killed,
        "whole_after_etcd_empty": _etcd_empty,
        "noticed_peer_killed": _peer_killed,
        "noticed_peer_stopped": _peer_stopped,
        "whole_after_nats_killed": _nats_killed,
    }
    figures: list[Figure] = []
    for name, fault in measured.items():
        runs = [uvloop.run(fault(options)) for _ in range(1 if options.quick else 3)]
        figures.append(Figure.of(name, runs, unit="s", better="lower", limit_value=_LIMITS_S[name]))
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


async def _etcd_killed(options: Options) -> float:
    return await _etcd(options, wipe=False)


async def _etcd_empty(options: Options) -> float:
    return await _etcd(options, wipe=True)


async def _etcd(options: Options, *, wipe: bool) -> float:
    """Time from the server's return until it knows all records again and a watch has come to it."""
    with tempfile.TemporaryDirectory() as folder:
        data, port = Path(folder) / "data", free_port()
        server = Server(etcd_command(data, port), port)
        await server.start()
        owner, other = (
            plugins.load("discoveries", "etcd")(f"etcd://127.0.0.1:{port}", clock=SystemClock(), options={})
            for _ in range(2)
        )
        await owner.start()
        await other.start()
        lease = await owner.lease()
        for number in range(RECORDS):
            await owner.put(f"v1/bench/{number}", b"x", lease=lease)
        watch = _Synced(other)
        await watch.reaches(1)
        server.kill()
        if wipe:
            shutil.rmtree(data)
        await asyncio.sleep(2.0 if options.quick or wipe else 10.0)
        await server.start()
        begun_s = time.monotonic()

        async def whole() -> None:
            found = await other.list("v1/bench/")
            if len(found) < RECORDS or not lease.valid:
                raise UnavailableError("records are missing")

        await asyncio.gather(watch.reaches(2), _succeeds(whole))
        took_s = time.monotonic() - begun_s
        await owner.close()
        await other.close()
        server.kill()
    return took_s


class _Synced:
    """Counts how often a watch was complete."""

    def __init__(self, discovery: Any) -> None:
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


async def _peer_killed(options: Options) -> float:
    return await _peer_lost(signal.SIGKILL)


async def _peer_stopped(options: Options) -> float:
    return await _peer_lost(signal.SIGSTOP)


async def _peer_lost(number: signal.Signals) -> float:
    """Time from the fault until the caller of a running call hears of it."""
    with peer("serve") as server:
        address = said(server)
        plane = await started()
        stream = await open_stream(plane, address, HOLD, b"")
        await stream.receive()
        server.send_signal(number)
        begun_s = time.monotonic()
        try:
            while await stream.receive():
                pass
        except DynamoError as error:
            assert error.migratable, error
        took_s = time.monotonic() - begun_s
        await plane.close()
    return took_s


async def _nats_killed(options: Options) -> float:
    """Time from the server's return until a call goes through again."""
    port = free_port()
    server = Server(["nats-server", "-a", "127.0.0.1", "-p", str(port)], port)
    await server.start()
    one, other = (
        plugins.load("request_planes", "nats")(f"nats://127.0.0.1:{port}", clock=SystemClock(), options={})
        for _ in range(2)
    )
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
    server.kill()
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
