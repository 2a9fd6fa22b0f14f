"""Discovery with a thousand instances: what an idle process costs, and how fast watchers agree."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop

from dynamo_core import plugins
from dynamo_core.clock import SystemClock
from dynamo_core.discovery import RecordPut, WatchSynced
from dynamo_tools.bench import Options
from dynamo_tools.bench.figure import Figure
from dynamo_tools.bench.measure import cpu_seconds
from dynamo_tools.bench.runtime_plane import peer, said

INSTANCES = 1000
WATCHERS = 8
IDLE_LIMIT_PERCENT = 0.5
CONVERGE_LIMIT_S = 1.0
_AT_ONCE = 32


def run(options: Options) -> list[Figure]:
    """Measure both stores.

    Raises:
        LookupError: if there is no ``etcd`` to measure with.
    """
    with tempfile.TemporaryDirectory() as folder, etcd(Path(folder) / "etcd") as url:
        return [
            _idle(options, "idle_cpu_file", f"file://{folder}/file"),
            _idle(options, "idle_cpu_etcd", url),
            *uvloop.run(_converging(options, url)),
        ]


@contextmanager
def etcd(folder: Path) -> Generator[str]:
    """Run an etcd of one member; yield its URL."""
    if shutil.which("etcd") is None:
        raise LookupError("the benchmark needs etcd; install Debian's etcd-server")
    port = free_port()
    with subprocess.Popen(etcd_command(folder, port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield f"etcd://127.0.0.1:{port}"
        finally:
            server.kill()


def etcd_command(folder: Path, port: int) -> list[str]:
    """Return the command of an etcd of one member."""
    client, peers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    return [
        *("etcd", "--data-dir", str(folder), "--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"),
    ]


def _idle(options: Options, name: str, url: str) -> Figure:
    """Watch a process that serves one endpoint, holds one lease and knows 1,000 instances."""
    with ExitStack() as stack:
        said(stack.enter_context(peer("register", url, INSTANCES)))
        process = stack.enter_context(peer("watch", url))
        said(process)
        period_s = 2.0 if options.quick else 10.0
        time.sleep(1.0)
        runs: list[float] = []
        for _ in range(1 if options.quick else 5):
            before_s = cpu_seconds([process.pid])
            time.sleep(period_s)
            runs.append((cpu_seconds([process.pid]) - before_s) / period_s * 100)
    return Figure.of(name, runs, unit="% of a core, 1000 instances", better="lower", limit_value=IDLE_LIMIT_PERCENT)


async def _converging(options: Options, url: str) -> list[Figure]:
    """Time eight watchers: to come to 1,000 records that are there, and to follow 1,000 that are written."""
    joins: list[float] = []
    follows: list[float] = []
    for number in range(1 if options.quick else 5):
        clients = [await _client(url) for _ in range(WATCHERS + 1)]
        prefix = f"bench/{number}/"
        views = [_View(client, prefix) for client in clients[1:]]
        await asyncio.gather(*(view.synced.wait() for view in views))
        await _write(clients[0], prefix)
        written_s = time.monotonic()
        await asyncio.gather(*(view.complete.wait() for view in views))
        follows.append(time.monotonic() - written_s)
        begun_s = time.monotonic()
        late = [_View(client, prefix) for client in clients[1:]]
        await asyncio.gather(*(view.complete.wait() for view in late))
        joins.append(time.monotonic() - begun_s)
        await asyncio.gather(*(client.close() for client in clients))
    return [
        Figure.of(name, runs, unit="s, 8 watchers", better="lower", limit_value=CONVERGE_LIMIT_S)
        for name, runs in (("etcd_join_1000", joins), ("etcd_follow_1000", follows))
    ]


async def _client(url: str) -> Any:
    client = plugins.load("discoveries", "etcd")(url, clock=SystemClock(), options={})
    await client.start()
    return client


async def _write(client: Any, prefix: str) -> None:
    lease = await client.lease()
    for start in range(0, INSTANCES, _AT_ONCE):
        numbers = range(start, min(INSTANCES, start + _AT_ONCE))
        await asyncio.gather(*(client.put(f"{prefix}{number}", bytes(200), lease=lease) for number in numbers))


class _View:
    def __init__(self, client: Any, prefix: str) -> None:
        self.synced = asyncio.Event()
        self.complete = asyncio.Event()
        self._keys: set[str] = set()
        self._task = asyncio.create_task(self._follow(client.watch(prefix)))

    async def _follow(self, watch: Any) -> None:
        async for event in watch:
            if isinstance(event, WatchSynced):
                self.synced.set()
            elif isinstance(event, RecordPut):
                self._keys.add(event.key)
                if len(self._keys) == INSTANCES:
                    self.complete.set()


def free_port() -> int:
    """Return a port that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
