"""One child process: its own session, prefixed output, a ready line, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from dynamo_runtime._settings import child_environment

ERROR_PREFIX = "dynamo: error: "
MAX_LINE_BYTES = 16 * 1024
READ_BYTES = 64 * 1024
OUTPUT_CLOSE_TIMEOUT_S = 1.0

WriteLine = Callable[[str, bool], None]
"""Takes a line of output and whether it came from stderr."""


def write_line(line: str, is_error: bool) -> None:
    """Write one line to this process's own stdout or stderr."""
    stream = sys.stderr if is_error else sys.stdout
    stream.write(line + "\n")
    stream.flush()


@dataclass(frozen=True)
class Inflow:
    """A pipe from a child: what we read, and the end the child inherits, closed here once it has."""

    reader: asyncio.StreamReader
    transport: asyncio.ReadTransport
    writing: int


@asynccontextmanager
async def _pipe() -> AsyncGenerator[Inflow]:
    reading, writing = os.pipe()
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
    )
    try:
        yield Inflow(reader, transport, writing)
    except BaseException:
        transport.close()
        raise
    finally:
        os.close(writing)


@dataclass(frozen=True)
class ReadyLine:
    """What a child said when it became ready."""

    status_url: str = ""


class ChildProcess:
    """A running child. Made by ``launch``."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, ready: Inflow, write: WriteLine) -> None:
        self.name = name
        self.error_line = ""
        self._process = process
        self._write = write
        self._ready = ready
        self._inflows = [ready]
        self._pumps: list[asyncio.Task[None]] = []

    @classmethod
    async def launch(
        cls, name: str, command: tuple[str, ...], env: Mapping[str, str], write: WriteLine = write_line
    ) -> ChildProcess:
        """Start a program in a session of its own, so that Ctrl-C reaches only the supervisor.

        Raises:
            OSError: if the program cannot be started.
        """
        # Own pipes: asyncio's would delay the exit status until whatever the child left behind closes them, too.
        async with AsyncExitStack() as stack:
            inflows = [await stack.enter_async_context(_pipe()) for _ in range(3)]
            out, err, ready = (inflow.writing for inflow in inflows)
            supervision = {"DYN_RUNTIME_READY_FD": str(ready), "DYN_RUNTIME_PARENT_PID": str(os.getpid())}
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=child_environment({"PYTHONUNBUFFERED": "1", **env, **supervision}),
                pass_fds=(ready,),
                start_new_session=True,
            )
            child = cls(name, process, inflows[2], write)
            child._follow(inflows[0], is_error=False)
            child._follow(inflows[1], is_error=True)
        return child

    @property
    def pid(self) -> int:
        """Process id, also the id of its process group."""
        return self._process.pid

    async def ready(self) -> ReadyLine | None:
        """Return its ready line, or None if it closed the descriptor without one. Cancellation loses nothing."""
        try:
            line = await self._ready.reader.readline()
        except ValueError:  # longer than any ready line
            return None
        if not line:
            return None
        with suppress(ValueError, AttributeError):
            return ReadyLine(str(json.loads(line).get("status_url", "")))
        return ReadyLine()

    async def wait(self) -> int:
        """Return the exit status (minus the signal's number if one ended it), once its output is written.

        Whatever it started and left behind in its process group is killed.
        """
        status = await self._process.wait()
        self.kill()
        _, late = await asyncio.wait(self._pumps, timeout=OUTPUT_CLOSE_TIMEOUT_S)
        for pump in late:
            pump.cancel()
        for inflow in self._inflows:
            inflow.transport.close()
        return status

    def terminate(self) -> None:
        """Ask it to drain and end."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill its whole process group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _follow(self, inflow: Inflow, *, is_error: bool) -> None:
        self._inflows.append(inflow)
        self._pumps.append(asyncio.create_task(self._pump(inflow.reader, is_error), name=f"{self.name}:output"))

    async def _pump(self, stream: asyncio.StreamReader, is_error: bool) -> None:
        rest = b""
        while chunk := await stream.read(READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._emit(line, is_error)
            if len(rest) > MAX_LINE_BYTES:
                self._emit(rest, is_error)
                rest = b""
        if rest:
            self._emit(rest, is_error)

    def _emit(self, raw: bytes, is_error: bool) -> None:
        line = raw.decode("utf-8", "replace").rstrip("\r")
        if is_error and line.startswith(ERROR_PREFIX):
            # The supervisor reports it, once, with what it does about it.
            self.error_line = line.removeprefix(ERROR_PREFIX)
            return
        self._write(f"{self.name} | {line}", is_error)
