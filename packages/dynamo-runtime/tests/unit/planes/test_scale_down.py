"""Drain under load: processes leave at random, and not one request is lost.

Each worker is a process of its own with a host, reached over TCP and found through file discovery.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from dynamo_core.errors import DynamoError
from dynamo_runtime import Runtime, RuntimeSettings

REQUESTS = 1000
SIMULTANEOUS = 32
WORKERS = 4
SCALE_DOWNS = 3
ENDPOINT = "test.backend.generate"
PROGRAM = Path(__file__).with_name("scale_down_worker.py")


class Fleet:
    """Worker processes, which leave one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[asyncio.subprocess.Process] = []
        self.left: list[asyncio.subprocess.Process] = []

    async def add(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(PROGRAM), str(self.folder), stdout=asyncio.subprocess.PIPE
        )
        self.running.append(process)
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"

    def retire(self, process: asyncio.subprocess.Process) -> None:
        self.running.remove(process)
        self.left.append(process)
        process.send_signal(signal.SIGTERM)

    async def ended(self) -> list[int]:
        return [await asyncio.wait_for(process.wait(), 30) for process in self.left]

    def kill(self) -> None:
        for process in (*self.running, *self.left):
            if process.returncode is None:
                process.kill()


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    made.kill()
    await asyncio.gather(*(process.wait() for process in (*made.running, *made.left)))


@pytest.mark.asyncio(loop_factories=["uvloop"])
@pytest.mark.parametrize("seed", [20_731])
async def test_random_scale_downs_lose_no_request(fleet: Fleet, seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    await asyncio.gather(*(fleet.add() for _ in range(WORKERS)))
    answered = 0
    served: set[bytes] = set()
    lost: list[DynamoError] = []
    progress = asyncio.Event()
    settings = RuntimeSettings(discovery=f"file://{fleet.folder}", event_bus="mem://")

    async def caller(runtime: Runtime, numbers: range) -> None:
        nonlocal answered
        for number in numbers:
            try:
                payload = await runtime.call(ENDPOINT, b"%d" % number)
                said, _, worker = payload.partition(b" ")
                assert said == b"%d" % number
                served.add(worker)
            except DynamoError as error:
                lost.append(error)
            answered += 1
            progress.set()

    async def scale() -> None:
        due = sorted(chance.sample(range(REQUESTS // 10, REQUESTS * 9 // 10), SCALE_DOWNS))
        for number in due:
            while answered < number:
                progress.clear()
                await progress.wait()
            fleet.retire(chance.choice(fleet.running))

    async with Runtime(settings) as runtime:
        share = REQUESTS // SIMULTANEOUS
        ranges = [range(each * share, (each + 1) * share) for each in range(SIMULTANEOUS - 1)]
        ranges.append(range((SIMULTANEOUS - 1) * share, REQUESTS))
        await asyncio.gather(scale(), *(caller(runtime, numbers) for numbers in ranges))
    assert lost == []
    assert answered == REQUESTS
    assert await fleet.ended() == [0] * SCALE_DOWNS
    assert len(served) == WORKERS
