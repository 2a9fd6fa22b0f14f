"""Processes of the frontend benchmark: servers and load generators, pinned, with the CPU time and memory of each."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, cast

from dynamo_tools.process import clean_environment

START_LIMIT_S = 90.0
_HERE = Path(__file__).parent
_NONE: Mapping[str, str] = MappingProxyType({})
Popen: TypeAlias = "subprocess.Popen[str]"


class ServerError(RuntimeError):
    """A server did not come up; the message has the end of its output."""


@dataclass(frozen=True)
class Place:
    """Where processes run, so that load and server do not share a core where there are two.

    Attributes:
        server: Cores of the server that is measured.
        others: Cores of everything else.
    """

    server: frozenset[int]
    others: frozenset[int]

    @classmethod
    def here(cls) -> Place:
        """Return the places of this machine: the first core, and the rest."""
        cores = sorted(os.sched_getaffinity(0))
        return cls(frozenset(cores[:1]), frozenset(cores[1:] or cores))


@contextlib.contextmanager
def process(
    argv: Sequence[str], cores: frozenset[int], folder: Path, env: Mapping[str, str] = _NONE, *, pipes: bool = False
) -> Generator[Popen, None, None]:
    """Run a process on some cores until the block ends; its output goes to a file of the folder."""
    log = folder / f"{time.monotonic_ns()}.log"
    with log.open("w", encoding="utf-8") as output:
        pipe = subprocess.PIPE if pipes else None
        child = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, sorted(cores))), *argv],
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or output,
            stderr=output,
            text=True,
            cwd=folder,
            env={**clean_environment(), **env},
        )
    child.args = [*argv, str(log)]
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for pipe_end in (child.stdin, child.stdout):
            if pipe_end is not None:
                pipe_end.close()


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_model(port: int, model: str, children: Sequence[Popen]) -> None:
    """Wait until a server answers a chat with the model.

    Raises:
        ServerError: if a process ends, or the time runs out.
    """
    deadline = time.monotonic() + START_LIMIT_S
    while not _answers(port, model):
        ended = [child for child in children if child.poll() is not None]
        if ended or time.monotonic() > deadline:
            raise ServerError(_tail((ended or list(children))[0]))
        time.sleep(0.1)


def generated_tokens(port: int, model: str, limit: int) -> int:
    """Return how many tokens an answer has for a limit: what a stream of the same limit is counted as.

    Raises:
        ServerError: if the server does not say.
    """
    status, body = _chat(port, model, limit)
    try:
        return int(json.loads(body)["usage"]["completion_tokens"])
    except (ValueError, LookupError, TypeError) as error:
        raise ServerError(f"status {status}: {body[:300]!r}") from error


def _answers(port: int, model: str) -> bool:
    try:
        return _chat(port, model, 1)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _chat(port: int, model: str, max_tokens: int) -> tuple[int, bytes]:
    message = {"role": "user", "content": "Hi"}
    body = json.dumps({"model": model, "messages": [message], "max_tokens": max_tokens, "temperature": 0})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def _tail(child: Popen) -> str:
    *argv, log = cast("list[str]", child.args)
    lines = Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    return f"{' '.join(argv[:4])}: {' | '.join(lines)[-400:]}"


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process's threads, finer than the clock ticks of its accounting: a run may take few of those."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text(encoding="ascii").split()[0]) for thread in threads) / 1e9


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


class Load:
    """A load generator as a process of its own.

    Args:
        child: The process.
    """

    def __init__(self, child: Popen) -> None:
        self._child = child

    def send(self, count: int) -> dict[str, Any]:
        """Send so many requests and return what was seen.

        Raises:
            ServerError: if an answer was not 200 or a connection broke.
        """
        self.start(count)
        return self.line()

    def start(self, count: int) -> None:
        """Send so many requests without waiting; ``line`` then returns what was seen."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(f"{count}\n")
            self._child.stdin.flush()

    def line(self) -> dict[str, Any]:
        """Wait for the next line of figures.

        Raises:
            ServerError: if there is none.
        """
        assert self._child.stdout is not None
        text = self._child.stdout.readline()
        if not text:
            self._child.wait()
            raise ServerError(_tail(self._child))
        return json.loads(text)


@contextlib.contextmanager
def load(url: str, model: str, mode: str, concurrency: int, tokens: int) -> Generator[Load, None, None]:
    """Run a load generator against a server."""
    argv = [sys.executable, str(_HERE / "http_load.py"), url, model, mode, str(concurrency), str(tokens)]
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    with process(argv, Place.here().others, folder, pipes=True) as child:
        yield Load(child)


@contextlib.contextmanager
def upstream(model: str, folder: Path) -> Generator[str, None, None]:
    """Run the simplest engine and return its URL."""
    argv = [sys.executable, str(_HERE / "http_upstream.py"), model]
    with process(argv, Place.here().others, folder, pipes=True) as child:
        assert child.stdout is not None
        yield f"http://127.0.0.1:{int(child.stdout.readline())}"
