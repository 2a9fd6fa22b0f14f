"""The load of ``test_scale_down``: a thousand requests while workers leave, or while one is cut off.

Each worker is a process of its own with a host, found through file discovery; with ``--namespaces`` each has a network
of its own too, joined to this process's by a pair of virtual devices, and this process must run under ``unshare -rn``.
It prints one line of JSON: what was asked, answered and lost, and how the workers ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import uvloop

from dynamo_core.errors import DynamoError
from dynamo_runtime import Runtime, RuntimeSettings

REQUESTS = 1000
SIMULTANEOUS = 32
WORKERS = 4
SCALE_DOWNS = 3
ENDPOINT = "test.backend.generate"
PROGRAM = Path(__file__).with_name("scale_down_worker.py")
PROMPT = "?keepalive_interval_s=0.2&keepalive_timeout_s=1.0&connect_timeout_s=0.5"
"""Options under which a path that was cut is noticed soon; where none is, a busy machine looks like it."""


class Fleet:
    """Worker processes, which leave one after the other."""

    def __init__(self, folder: Path, loop: str, options: str, *, namespaces: bool) -> None:
        self.running: list[asyncio.subprocess.Process] = []
        self.left: list[asyncio.subprocess.Process] = []
        self._folder = folder
        self._loop = loop
        self._options = options
        self._namespaces = namespaces

    async def add(self, number: int) -> None:
        """Start a worker and wait until it serves."""
        host = f"10.9.{number}.2" if self._namespaces else "127.0.0.1"
        command = [sys.executable, str(PROGRAM), str(self._folder), f"tcp://{host}:0{self._options}", self._loop]
        if self._namespaces:
            # It waits for its network, and keeps its number when it becomes the worker.
            command = ["unshare", "--net", "sh", "-c", 'read -r _ && exec "$@"', "sh", *command]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self.running.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        if self._namespaces:
            join_networks(process.pid, number)
            process.stdin.write(b"go\n")
        said = await asyncio.wait_for(process.stdout.readline(), 60)
        assert said == b"ready\n", said

    def retire(self, process: asyncio.subprocess.Process) -> None:
        """Tell a worker to leave."""
        self.running.remove(process)
        self.left.append(process)
        process.send_signal(signal.SIGTERM)

    async def ended(self) -> list[int]:
        """Return how those that left ended."""
        return [await asyncio.wait_for(process.wait(), 60) for process in self.left]

    async def kill(self) -> None:
        """Kill whatever still runs."""
        for process in (*self.running, *self.left):
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*(process.wait() for process in (*self.running, *self.left)))


class Load:
    """Callers that ask again and again until all requests have been made."""

    def __init__(self, runtime: Runtime) -> None:
        self.answered = 0
        self.served: set[bytes] = set()
        self.lost: list[str] = []
        self._runtime = runtime
        self._progress = asyncio.Event()

    async def run(self) -> None:
        """Make all requests."""
        numbers = iter(range(REQUESTS))
        await asyncio.gather(*(self._caller(numbers) for _ in range(SIMULTANEOUS)))

    async def reaches(self, number: int) -> None:
        """Return once so many requests have ended."""
        while self.answered < number:
            self._progress.clear()
            await self._progress.wait()

    async def _caller(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            try:
                payload = await self._runtime.call(ENDPOINT, b"%d" % number)
                said, _, worker = payload.partition(b" ")
                assert said == b"%d" % number
                self.served.add(worker)
            except DynamoError as error:
                self.lost.append(error.reason)
                print(f"{number}: {error.reason}: {error.diagnostic}", file=sys.stderr)
            self.answered += 1
            self._progress.set()


def join_networks(pid: int, number: int) -> None:
    """Join a process's network to this one's."""
    inside = ["nsenter", "--target", str(pid), "--net"]
    for command in (
        ["ip", "link", "add", "name", f"here{number}", "type", "veth", "peer", "name", f"there{number}"],
        ["ip", "link", "set", f"there{number}", "netns", str(pid)],
        ["ip", "addr", "add", f"10.9.{number}.1/24", "dev", f"here{number}"],
        ["ip", "link", "set", f"here{number}", "up"],
        [*inside, "ip", "addr", "add", f"10.9.{number}.2/24", "dev", f"there{number}"],
        [*inside, "ip", "link", "set", f"there{number}", "up"],
        [*inside, "ip", "link", "set", "lo", "up"],
    ):
        subprocess.run(command, check=True)


async def scale_down(fleet: Fleet, load: Load, chance: random.Random) -> None:
    """Let workers leave at random moments."""
    for number in sorted(chance.sample(range(REQUESTS // 10, REQUESTS * 9 // 10), SCALE_DOWNS)):
        await load.reaches(number)
        fleet.retire(chance.choice(fleet.running))


async def cut_off(load: Load, chance: random.Random) -> None:
    """Pull the cable of a worker, and put it back later."""
    number = chance.randrange(WORKERS)
    await load.reaches(REQUESTS // 4)
    subprocess.run(["ip", "link", "set", f"here{number}", "down"], check=True)
    await load.reaches(REQUESTS * 3 // 4)
    subprocess.run(["ip", "link", "set", f"here{number}", "up"], check=True)


async def main(options: argparse.Namespace) -> None:
    """Run one case and print what came of it."""
    chance = random.Random(options.seed)
    times = PROMPT if options.fault == "cut" else ""
    fleet = Fleet(options.folder, options.loop, times, namespaces=options.namespaces)
    plane = f"tcp://127.0.0.1:0{times}"
    settings = RuntimeSettings(discovery=f"file://{options.folder}", event_bus="mem://", request_plane=plane)
    try:
        await asyncio.gather(*(fleet.add(number) for number in range(WORKERS)))
        async with Runtime(settings) as runtime:
            load = Load(runtime)
            fault = cut_off(load, chance) if options.fault == "cut" else scale_down(fleet, load, chance)
            await asyncio.gather(load.run(), fault)
        found = {"answered": load.answered, "lost": load.lost, "served": len(load.served), "ended": await fleet.ended()}
        print(json.dumps(found), flush=True)
    finally:
        await fleet.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="uvloop")
    parser.add_argument("--fault", choices=["scale-down", "cut"], default="scale-down")
    parser.add_argument("--namespaces", action="store_true")
    chosen = parser.parse_args()
    (uvloop.run if chosen.loop == "uvloop" else asyncio.run)(main(chosen))
