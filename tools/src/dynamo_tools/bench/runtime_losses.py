"""What is lost, and when that is noticed, if peers, paths, disks or clocks fail; with the default options."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import INSTANCES_PREFIX, RecordDeleted, WatchSynced
from dynamo_core.errors import DynamoError
from dynamo_core.planes import RequestContext, RequestPlane, ResponseSink
from dynamo_core.streams import open_stream
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.runtime_peer import HOLD, ITEM, started
from dynamo_tools.bench.runtime_plane import peer, said
from dynamo_tools.bench.runtime_road import Road

RECORDS = 100
_SILENCE_LIMIT_S = 40.0
_DAY_S = 86_400


def run(options: Options) -> list[Figure]:
    """Cause each fault."""
    count = 1 if options.quick else 3
    killed = [uvloop.run(_peer_lost(signal.SIGKILL)) for _ in range(count)]
    silences = [uvloop.run(_silences()) for _ in range(count)]
    owners = [uvloop.run(_owner_killed()) for _ in range(count)]
    disks = [_disk_full() for _ in range(count)]
    jumps = [uvloop.run(_clock_jumps()) for _ in range(count)]
    stopped, cut, half_open = zip(*silences, strict=True)
    return [
        Figure.of("noticed_peer_killed", killed, unit="s", better="lower", limit_value=1.0),
        Figure.of("noticed_peer_stopped", stopped, unit="s", better="lower", limit_value=_SILENCE_LIMIT_S),
        Figure.of("noticed_path_cut", cut, unit="s", better="lower", limit_value=_SILENCE_LIMIT_S),
        Figure.of("noticed_half_open", half_open, unit="s", better="lower", limit_value=_SILENCE_LIMIT_S),
        Figure.of("noticed_file_owner_killed", owners, unit="s", better="lower", limit_value=2.5),
        Figure.of("whole_after_disk_full", disks, unit="s", better="lower", limit_value=1.0),
        Figure.of("lost_by_clock_jumps", jumps, unit=f"records of {RECORDS}", better="lower", limit_value=0.0),
    ]


async def _silences() -> tuple[float, float, float]:
    """Wait for what only keep-alives notice, all at once."""
    stopped, (cut, half_open) = await asyncio.gather(_peer_lost(signal.SIGSTOP), _path_cut())
    return stopped, cut, half_open


async def _peer_lost(number: signal.Signals) -> float:
    """Time from the fault until the caller of a running call hears of it."""
    with peer("serve") as server:
        plane = await started()
        stream = await open_stream(plane, said(server), HOLD, b"")
        await stream.receive()
        server.send_signal(number)
        took_s = await _until_lost(stream)
        await plane.close()
    return took_s


async def _path_cut() -> tuple[float, float]:
    """Time from the cut until the caller hears of it, and until the handler at the other end is told to stop."""
    told: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def handler(payload: bytes, context: RequestContext, sink: ResponseSink) -> None:
        sink.send(ITEM)
        await context.wait_stopped()
        told.set_result(time.monotonic())

    server: RequestPlane = await started()
    client = await started()
    served = await server.serve(HOLD, handler)
    async with Road(int(served.address.rpartition(":")[2])) as road:
        stream = await open_stream(client, f"tcp://127.0.0.1:{road.port}", HOLD, b"")
        await stream.receive()
        road.cut()
        begun_s = time.monotonic()
        took_s, told_s = await asyncio.gather(_until_lost(stream), told)
    await client.close()
    await server.close()
    return took_s, told_s - begun_s


async def _until_lost(stream: Any) -> float:
    begun_s = time.monotonic()
    try:
        while await stream.receive():
            pass
    except DynamoError as error:
        assert error.migratable, error
    return time.monotonic() - begun_s


async def _owner_killed() -> float:
    """Time until the records of a killed process have left ``file`` discovery."""
    with tempfile.TemporaryDirectory() as folder, peer("register", f"file://{folder}", RECORDS) as owner:
        said(owner)
        client = plugins.load("discoveries", "file")(f"file://{folder}", clock=SystemClock(), options={})
        await client.start()
        watch, there = client.watch(INSTANCES_PREFIX), 0
        while not isinstance(await anext(watch), WatchSynced):
            there += 1
        assert there == RECORDS
        owner.kill()
        begun_s = time.monotonic()
        while there:
            there -= isinstance(await anext(watch), RecordDeleted)
        took_s = time.monotonic() - begun_s
        await client.close()
    return took_s


def _disk_full() -> float:
    """Time from the first free byte of a full disk until a record is written; the disk is a small one of memory."""
    mount = 'mount -t tmpfs -o size=256k tmpfs "$1" && shift && exec "$@"'
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*alone, "sh", "-c", mount, "sh", folder]
        program = [sys.executable, "-m", "dynamo_tools.bench.runtime_peer", "fill", folder]
        done = subprocess.run([*command, *program], capture_output=True, text=True, check=True, timeout=60)
    return float(done.stdout)


async def _clock_jumps() -> float:
    """Count records that a watch loses while the heartbeats of their lease jump by a day, forth and back."""
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        factory = plugins.load("discoveries", "file")
        owner, other = (factory(f"file://{folder}", clock=SystemClock(), options={}) for _ in range(2))
        await owner.start()
        await other.start()
        lease = await owner.lease(1.0)
        for number in range(RECORDS):
            await owner.put(f"v1/bench/{number}", b"x", lease=lease)
        (heartbeats,) = (Path(folder) / ".state" / "leases").iterdir()
        watch = other.watch("v1/bench/")
        while not isinstance(await anext(watch), WatchSynced):
            pass
        for jump_s in (_DAY_S, -_DAY_S) * 2:
            now_s = time.time() + jump_s
            os.utime(heartbeats, (now_s, now_s))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    while True:
                        lost += isinstance(await anext(watch), RecordDeleted)
        await owner.close()
        await other.close()
    return float(lost)
