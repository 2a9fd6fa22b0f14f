"""A small cluster on loopback whose processes may come from different environments.

It is driven from outside, by commands and HTTP, so it needs nothing of the product and works with any release.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_tools.process import clean_environment

LIMIT_S = 60.0
PROMPT = "In the beginning God created the heaven and the earth."
REQUEST = {"model": "tinylm", "prompt": PROMPT, "seed": 7, "max_tokens": 300, "ignore_eos": True}
KILL_AFTER_CHUNKS = 20
GRAPH = """\
services:
  worker:
    component: worker
    args: {{engine: mock, model: tinylm, speedup-ratio: 20}}
  frontend:
    component: frontend
    args: {{http-port: {port}}}
"""


class ClusterError(Exception):
    """The cluster did not do what it should; the message says what, with the output of its processes."""


@dataclass(frozen=True)
class Started:
    """A running process and the file with its output."""

    process: subprocess.Popen[bytes]
    output: Path


def served(frontend: Path, workers: list[Path]) -> str | None:
    """Serve a streamed completion, then lose its worker in the middle of another: the text must be the same.

    Args:
        frontend: Interpreter of the frontend's environment.
        workers: Interpreter of each worker's environment.

    Returns:
        What went wrong, or None.
    """
    with cluster_folder() as folder, contextlib.ExitStack() as stack:
        port, planes = free_port(), _planes(folder)
        try:
            for number, python in enumerate(workers):
                flags = ["worker", "--engine", "mock", "--model", "tinylm", *planes]
                stack.enter_context(started(python, flags, folder, f"worker{number}"))
            flags = ["frontend", "--http-port", str(port), *planes]
            stack.enter_context(started(frontend, flags, folder, "frontend"))
            _until(lambda: model_is_served(port), "model")
            running = workers_of(frontend, planes)  # before the stream, so that the loss falls into it
            calm = stream(port)
            lost = stream(port, KILL_AFTER_CHUNKS, lambda worker: os.kill(running[worker], signal.SIGKILL))
        except (ClusterError, OSError) as error:
            return f"{error}\n{_outputs(folder)}"
        if calm != lost or not calm:
            return f"the text differs after the loss of a worker:\n{calm!r}\n{lost!r}\n{_outputs(folder)}"
    return None


def planned(supervisor: Path, planner: Path) -> str | None:
    """Let a planner of one environment scale the supervisor of another to two workers.

    Returns:
        What went wrong, or None.
    """
    with cluster_folder() as folder, contextlib.ExitStack() as stack:
        port, planes = free_port(), _planes(folder)
        graph = folder / "graph.yaml"
        graph.write_text(GRAPH.format(port=port), encoding="utf-8")
        try:
            up = ["up", str(graph), *planes]
            stack.enter_context(started(supervisor, up, folder, "supervisor", announces=False))
            _until(lambda: model_is_served(port), "model")
            flags = ["planner", "--role", "worker", "--min-replicas", "2", "--interval-s", "1", *planes]
            stack.enter_context(started(planner, flags, folder, "planner"))
            _until(lambda: len(workers_of(planner, planes)) == 2, "second worker")
        except (ClusterError, OSError) as error:
            return f"{error}\n{_outputs(folder)}"
    return None


@contextlib.contextmanager
def cluster_folder() -> Generator[Path]:
    """A folder for discovery and output."""
    with tempfile.TemporaryDirectory(prefix="dynamo-compat-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def started(python: Path, flags: list[str], folder: Path, name: str, *, announces: bool = True) -> Generator[Started]:
    """A ``dynamo`` process, ready on entry if it announces so, ended with all it started on exit.

    Raises:
        ClusterError: if it is not ready in time.
    """
    reading, writing = os.pipe()
    ready = ["--ready-fd", str(writing)] if announces else []
    output = folder / f"{name}.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [str(python), "-m", "dynamo_runtime", *flags, *ready],
            cwd=folder,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            start_new_session=True,
        )
    os.close(writing)
    try:
        if announces:
            _wait_ready(reading, f"{name} of {python} is not ready:\n", output)
        yield Started(process, output)
    finally:
        os.close(reading)
        _end(process)


def stream(port: int, kill_after: int = 0, kill: Callable[[str], None] | None = None) -> str:
    """Stream one completion; return its text.

    Args:
        port: Port of the frontend.
        kill_after: Chunks after which ``kill`` is called with the id of the worker; 0 for never.
        kill: Ends the worker of an instance.

    Raises:
        ClusterError: if the answer is no success, or an error ends the stream.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    with contextlib.closing(connection):
        body = json.dumps({**REQUEST, "stream": True})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise ClusterError(f"the frontend answers {answer.status}: {answer.read().decode()}")
        pieces: list[str] = []
        for line in answer:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise ClusterError(f"the stream ends with {event['error']}")
            pieces += [choice["text"] for choice in event["choices"]]
            if kill is not None and len(pieces) == kill_after:
                kill(str(answer.headers["x-dynamo-worker-id"]).split("/", maxsplit=1)[0])
        if kill is not None and len(pieces) < kill_after:
            raise ClusterError(f"the stream had {len(pieces)} chunks, too few to lose a worker in")
        return "".join(pieces)


def model_is_served(port: int) -> bool:
    """Whether the frontend lists a model."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/v1/models")
        return bool(json.loads(connection.getresponse().read()).get("data"))
    return False


def workers_of(python: Path, planes: list[str]) -> dict[str, int]:
    """Process of each worker, by the hex id of its instance."""
    argv = [str(python), "-m", "dynamo_runtime", "instances", "--json-lines", *planes[:2]]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=clean_environment())
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        format(record["instance_id"], "x"): int(record["metadata"]["pid"])
        for record in records
        if (record["endpoint"]["component"], record["endpoint"]["endpoint"]) == ("backend", "generate")
    }


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _planes(folder: Path) -> list[str]:
    return ["--discovery", f"file://{folder}/discovery"]


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"no {what} within {LIMIT_S:g} s")
        time.sleep(0.1)


def _wait_ready(descriptor: int, message: str, output: Path) -> None:
    readable, _, _ = select.select([descriptor], [], [], LIMIT_S)
    if not readable or not os.read(descriptor, 4096):
        raise ClusterError(message + output.read_text(encoding="utf-8", errors="replace")[-4000:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to stop, then end its whole session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def _outputs(folder: Path) -> str:
    parts = [(path.name, path.read_text(encoding="utf-8", errors="replace")) for path in sorted(folder.glob("*.log"))]
    return "\n".join(f"--- {name}\n{text[-3000:]}" for name, text in parts)
