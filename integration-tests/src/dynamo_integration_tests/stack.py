"""Starts `dynamo` commands as a person would, and looks at them from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0
_URL = re.compile(r"http://127\.0\.0\.1:\d+")


class StackError(AssertionError):
    """A command did not do what it should; the message has its output."""


class DynamoProcess:
    """One `dynamo` command, its output collected from the start.

    Args:
        arguments: What comes after `dynamo`.
        env: Variables to add.
    """

    def __init__(self, arguments: Sequence[str], env: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dynamo_runtime", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> DynamoProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Process id of the command."""
        return self._process.pid

    @property
    def output(self) -> str:
        """Everything printed so far."""
        with self._changed:
            return "".join(self._lines)

    def wait_for(self, pattern: str, limit_s: float = START_LIMIT_S) -> re.Match[str]:
        """Return the first match of a pattern in the output, waiting for it.

        Raises:
            StackError: if the command ends or the time runs out before it appears.
        """
        deadline = time.monotonic() + limit_s
        with self._changed:
            while True:
                text = "".join(self._lines)
                if found := re.search(pattern, text):
                    return found
                left = deadline - time.monotonic()
                ended = self._process.poll() is not None and not self._reader.is_alive()
                if left <= 0 or ended:
                    raise StackError(f"{pattern!r} did not appear; output:\n{text}")
                self._changed.wait(min(left, 0.2))

    def wait_for_url(self) -> str:
        """Return the URL that `dynamo serve` prints once it is ready."""
        return self.wait_for(_URL.pattern).group()

    def interrupt(self, signum: int = signal.SIGINT) -> int:
        """Send a signal, wait for the end, return the exit status."""
        self.send_signal(signum)
        return self.wait()

    def send_signal(self, signum: int) -> None:
        """Send a signal to the command, and to it alone."""
        self._process.send_signal(signum)

    def wait(self, limit_s: float = STOP_LIMIT_S) -> int:
        """Wait for the end and return the exit status.

        Raises:
            StackError: if it does not end in time.
        """
        try:
            status = self._process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise StackError(f"still running after {limit_s:g} s; output:\n{self.output}") from error
        self._reader.join(limit_s)
        return status

    def kill(self) -> None:
        """End it and all its descendants the hard way, if anything still runs."""
        for pid in [*descendants(self.pid), self.pid]:
            kill_process(pid)
        self.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def kill_process(pid: int) -> None:
    """SIGKILL a process; one that is gone is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the process ids below a process, children before grandchildren."""
    found: list[int] = []
    queue = [pid]
    while queue:
        children = _children(queue.pop(0))
        found += children
        queue += children
    return found


def command_line(pid: int) -> list[str]:
    """Return a process's arguments; empty if it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode() for part in raw.split(b"\0") if part]


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = START_LIMIT_S) -> None:
    """Poll a condition until it holds.

    Raises:
        StackError: if the time runs out.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise StackError(f"no {what} within {limit_s:g} s")
        time.sleep(0.05)


def flag_value(pid: int, flag: str) -> str:
    """Return the value of a flag on a process's command line.

    Raises:
        StackError: if it is not there.
    """
    arguments = command_line(pid)
    if flag not in arguments:
        raise StackError(f"process {pid} has no {flag}: {arguments}")
    return arguments[arguments.index(flag) + 1]


def component_pids(pid: int, component: str) -> list[int]:
    """Return the processes below one that run a component."""
    return [child for child in descendants(pid) if component in command_line(child)[:6]]


def instance_pids(discovery: str) -> dict[str, int]:
    """Return the process id of every instance that discovery knows, by the hex id that headers show."""
    result = subprocess.run(
        [sys.executable, "-m", "dynamo_runtime", "instances", "--discovery", discovery, "--json-lines"],
        capture_output=True,
        text=True,
        check=True,
        timeout=START_LIMIT_S,
    )
    records = [json.loads(line) for line in result.stdout.splitlines()]
    return {format(record["instance_id"], "x"): int(record["metadata"]["pid"]) for record in records}


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
