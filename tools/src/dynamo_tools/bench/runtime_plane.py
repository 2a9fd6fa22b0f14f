"""The request plane: CPU of a round trip and of token frames, memory of many streams and of slow readers.

Server and client are processes of their own. CPU time counts, so the figures hold on a busy machine too.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvloop

from dynamo_core.errors import DynamoError
from dynamo_core.planes import Call, CallOptions, RequestPlane
from dynamo_core.streams import call_unary
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.runtime_peer import CPU, ECHO, FLOOD, FLOOD_ITEM_BYTES, HOLD, STREAMS, TOKENS, started

UNARY_LIMIT_US = 60.0
FRAMES_LIMIT = 500_000.0
MANY_STREAMS = 10_000
MANY_STREAMS_LIMIT_MIB = 300.0
_SLOW_READERS = 64
_SLOW_CREDIT = 256
_CREDIT = 256


def run(options: Options) -> list[Figure]:
    """Measure all of it.

    A lone call is measured on one core, and across two: there each side sleeps until the other has worked, and what it
    costs a virtual machine to wake an idle core is about as much as the call.
    """
    with one_core(), peer("serve") as server:
        alone = uvloop.run(_unary_cost(options, said(server)))
    with peer("serve") as server:
        figures = uvloop.run(_costs(options, said(server)))
    return [alone, *figures, _many_streams(options), _slow_readers(options)]


@contextmanager
def one_core() -> Generator[None]:
    """Keep this process, and those that it starts, to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def peer(*arguments: object) -> Generator[subprocess.Popen[str]]:
    """Run a program of ``runtime_peer``; it ends with the context."""
    command = [sys.executable, "-m", "dynamo_tools.bench.runtime_peer", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            # One that measured what it should need not leave in order.
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    """Return the next line that a peer says.

    Raises:
        RuntimeError: if it ended instead.
    """
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{process.args} ended with status {process.wait()}")
    return line


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(f"process {pid} is gone")


class GrantingReader:
    """A receiver that grants what it takes, as a frontend does."""

    def __init__(self, ended: asyncio.Semaphore) -> None:
        self.call: Call | None = None
        self.count = 0
        self._ended = ended

    def on_items(self, items: Sequence[bytes]) -> None:
        """Count and grant."""
        self.count += len(items)
        if self.call is not None:
            self.call.grant(len(items))

    def on_end(self, error: DynamoError | None) -> None:
        """Count the end."""
        assert error is None, error
        self._ended.release()


async def _unary_cost(options: Options, address: str) -> Figure:
    plane = await started()
    figure = await _unary(options, plane, address, "unary_cpu", 1)
    await plane.close()
    return figure


async def _costs(options: Options, address: str) -> list[Figure]:
    plane = await started()
    figures = [
        await _unary(options, plane, address, "unary_cpu_across_cores", 1),
        await _unary(options, plane, address, "unary_cpu_64_at_once", STREAMS),
        *await _frames(options, plane, address),
    ]
    await plane.close()
    return figures


async def _unary(options: Options, plane: RequestPlane, address: str, name: str, width: int) -> Figure:
    calls = (1_000 if options.quick else 10_000) // width

    async def worker() -> None:
        for _ in range(calls):
            await call_unary(plane, address, ECHO, b"x" * 64)

    runs: list[float] = []
    for _ in range(options.runs + 1):
        before = await _cpu(plane, address)
        await asyncio.gather(*(worker() for _ in range(width)))
        after = await _cpu(plane, address)
        runs.append((sum(after) - sum(before)) / (calls * width) * 1e6)
    return Figure.of(name, runs[1:], unit="us CPU, both sides", better="lower", limit_value=UNARY_LIMIT_US)


async def _frames(options: Options, plane: RequestPlane, address: str) -> list[Figure]:
    count = 500 if options.quick else 5_000
    sides: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.runs + 1):
        before = await _cpu(plane, address)
        await _stream(plane, address, count)
        after = await _cpu(plane, address)
        for side, start_s, end_s in zip(sides, before, after, strict=True):
            side.append(STREAMS * count / (end_s - start_s))
    return [
        Figure.of(name, side[1:], unit="frames/CPU-s at 64 streams", better="higher", limit_value=FRAMES_LIMIT)
        for name, side in zip(("token_frames_received", "token_frames_sent"), sides, strict=True)
    ]


async def _stream(plane: RequestPlane, address: str, count: int) -> None:
    ended = asyncio.Semaphore(0)
    readers = [GrantingReader(ended) for _ in range(STREAMS)]
    for reader in readers:
        options = CallOptions(credit_items=_CREDIT)
        reader.call = await plane.open(address, TOKENS, b"%d" % count, reader, options)
    for _ in readers:
        await ended.acquire()
    assert [reader.count for reader in readers] == [count] * STREAMS


async def _cpu(plane: RequestPlane, address: str) -> tuple[float, float]:
    """Return the CPU seconds of this process and of the server."""
    return time.process_time(), float(await call_unary(plane, address, CPU, b""))


def _many_streams(options: Options) -> Figure:
    """Hold 10,000 streams open; the larger of both sides counts."""
    runs: list[float] = []
    for _ in range(1 if options.quick else 3):
        with peer("serve") as server:
            address = said(server)
            with peer("call", address, HOLD, MANY_STREAMS, _CREDIT) as client:
                said(client)
                runs.append(max(resident_mib(server.pid), resident_mib(client.pid)))
    return Figure.of(
        "memory_10000_streams", runs, unit="MiB, larger side", better="lower", limit_value=MANY_STREAMS_LIMIT_MIB
    )


def _slow_readers(options: Options) -> Figure:
    """Flood 64 readers that never grant; what the server's memory grows by, beside what their credit allows."""
    runs: list[float] = []
    for _ in range(1 if options.quick else 3):
        with peer("serve") as server:
            address = said(server)
            before_mib = resident_mib(server.pid)
            with peer("call", address, FLOOD, _SLOW_READERS, _SLOW_CREDIT) as client:
                said(client)
                time.sleep(0.5 if options.quick else 3.0)
                runs.append(max(0.0, resident_mib(server.pid) - before_mib))
    allowed_mib = _SLOW_READERS * _SLOW_CREDIT * FLOOD_ITEM_BYTES / (1 << 20)
    return Figure.of("memory_64_slow_readers", runs, unit="MiB growth", better="lower", limit_value=allowed_mib)
