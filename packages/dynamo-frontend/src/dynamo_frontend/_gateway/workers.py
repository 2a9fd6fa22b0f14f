"""Several gateway processes on one port: started, watched and ended together, with their metrics joined."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import structlog

from dynamo_core.clock import Clock
from dynamo_core.errors import ConfigurationError

_log = structlog.get_logger(__name__)
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 10.0
_MISCONFIGURED = 2
_KILL_GRACE_S = 5.0


def reserve_port(host: str, port: int) -> tuple[socket.socket, int]:
    """Bind a port that all processes can share, so that a free one is the same for each; it does not listen.

    Raises:
        ConfigurationError: if the address cannot be had.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        holder = socket.socket(family, kind, proto)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"HTTP {host}:{port} cannot be shared by workers: {error}; choose another with --http-host and --http-port"
        ) from error
    return holder, int(holder.getsockname()[1])


class WorkerProcesses:
    """The processes of one gateway.

    One that ends by itself is started again, after pauses that double while it does not stay up. One that is set up
    wrongly ends all.

    Args:
        arguments: Arguments of ``dynamo-frontend serve`` that all have.
        count: How many.
        clock: Time.
        drain_timeout_s: Time that a worker has to finish its replies.
    """

    def __init__(self, arguments: Sequence[str], count: int, clock: Clock, drain_timeout_s: float) -> None:
        self._arguments = list(arguments)
        self._count = count
        self._clock = clock
        self._drain_timeout_s = drain_timeout_s
        self._children: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = False
        self.restarts = 0

    async def run(self, stop: asyncio.Event) -> int:
        """Run until asked to stop or a worker is set up wrongly; return the exit status."""
        with tempfile.TemporaryDirectory(prefix="dynamo-frontend-") as folder:
            keepers = [asyncio.create_task(self._keep(index, folder)) for index in range(self._count)]
            asked = asyncio.create_task(stop.wait())
            await asyncio.wait([*keepers, asked], return_when=asyncio.FIRST_COMPLETED)
            self._stopping = True
            failed = any(keeper.done() for keeper in keepers)
            asked.cancel()
            await self._end(keepers)
        return _MISCONFIGURED if failed else 0

    async def _keep(self, index: int, folder: str) -> None:
        """Run one worker again and again; return only if it is set up wrongly or all are to end."""
        pause_s = _FIRST_PAUSE_S
        while not self._stopping:
            began = self._clock.monotonic()
            child = await self._start(index, folder)
            status = await child.wait()
            if self._stopping or status == _MISCONFIGURED:
                return
            self.restarts += 1
            pause_s = _FIRST_PAUSE_S if self._clock.monotonic() - began > _STEADY_S else pause_s
            _log.error("worker process ended; it is started again", worker=index, status=status, pause_s=pause_s)
            await self._clock.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    async def _start(self, index: int, folder: str) -> asyncio.subprocess.Process:
        identity = ["--worker-index", str(index), "--worker-folder", folder]
        argv = [sys.executable, "-m", "dynamo_frontend", "serve", *self._arguments, *identity]
        # A group of its own: a Ctrl-C of the terminal reaches this process, which ends the workers in order.
        child = await asyncio.create_subprocess_exec(*argv, stdin=subprocess.PIPE, start_new_session=True)
        self._children[index] = child
        return child

    async def _end(self, keepers: Iterable[asyncio.Task[None]]) -> None:
        waiting = list(keepers)
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        _, late = await asyncio.wait(waiting, timeout=self._drain_timeout_s + _KILL_GRACE_S)
        for child in self._children.values():
            if late and child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
        for keeper in late:
            keeper.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


class SharedMetrics:
    """Metrics of all workers, whichever of them is asked: each offers its own on a socket in a private folder.

    Args:
        folder: The folder.
        index: Which worker this is.
    """

    def __init__(self, folder: Path, index: int) -> None:
        self._folder = folder
        self._path = folder / f"{index}.sock"
        self._server: asyncio.Server | None = None

    async def start(self, render: Callable[[], bytes]) -> None:
        """Offer this worker's metrics to the others."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(render())
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            writer.close()

        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(answer, str(self._path))
        os.chmod(self._path, 0o600)

    async def gather(self, own: bytes) -> bytes:
        """Return the metrics of all workers. One that does not answer in time is left out."""
        others = [path for path in sorted(self._folder.glob("*.sock")) if path != self._path]
        texts = await asyncio.gather(*(_read(path) for path in others))
        return join_metrics([own, *(text for text in texts if text)])

    def close(self) -> None:
        """Offer them no longer. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._path.unlink(missing_ok=True)


async def _read(path: Path) -> bytes:
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


def join_metrics(texts: Iterable[bytes]) -> bytes:
    """Join texts of metrics: each family's samples stand together, behind one description."""
    heads: dict[bytes, list[bytes]] = {}
    samples: dict[bytes, list[bytes]] = {}
    for text in texts:
        family = b""
        for line in text.splitlines():
            if line.startswith(b"# HELP ") or line.startswith(b"# TYPE "):
                family = line.split(b" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(line)
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, ()))]
    return b"\n".join(lines) + b"\n"
